"""Copies between the host and a GPU that nobody waits for: from and into pinned memory, in the order of the stream."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy of a host tensor, there before whatever the device is given next."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Readback:
    """What a tensor held when this was made, on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))
        else:
            self._host = values.clone()

    def read(self) -> Tensor:
        """On the host; waits until it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
