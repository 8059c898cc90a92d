"""Which layout the ranks of a worker execute: the cheapest of the hardware that they run on."""

from __future__ import annotations

import torch

from services.gpu_worker.compiler.parallel_cost import A100_NVLINK, CPU_GLOO, H200_NVLINK, Hardware, Workload
from services.gpu_worker.compiler.parallelize import parallelize
from services.gpu_worker.model.layouts import ONE_RANK, Layout
from services.gpu_worker.model.peft import Method
from services.gpu_worker.model.weights import ModelWeights

GPUS = (H200_NVLINK, A100_NVLINK)


def choose_layout(weights: ModelWeights, method: Method) -> Layout:
    """The same on every rank of the weights' group; every rank has to call it."""
    if weights.group.size == 1:
        return ONE_RANK
    workload = Workload(element_size=weights.dtype.itemsize)
    return parallelize(weights.whole, method, weights.group.size, _hardware(weights), workload).layout


def _hardware(weights: ModelWeights) -> Hardware:
    """By the name of rank 0's device: an unknown GPU counts as an H200."""
    if weights.device.type != "cuda":
        return CPU_GLOO
    name = torch.cuda.get_device_name(weights.device)
    return GPUS[int(weights.group.first("A100" in name))]
