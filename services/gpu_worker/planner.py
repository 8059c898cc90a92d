"""Makes the plan of a finetuning: every number comes from the compiled graphs, or from our own code run on tensors
that hold nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from itertools import groupby

from services.gpu_worker.baseline import BaselineUnavailable
from services.gpu_worker.compiler.flops import backward_flops, forward_flops, head_flops
from services.gpu_worker.compiler.parallel_cost import A100_NVLINK, CPU_GLOO, H200_NVLINK, Hardware, Workload
from services.gpu_worker.compiler.parallelize import ParallelPlan, parallelize
from services.gpu_worker.compiler.plan import TensorPlan, num_backward_operations, tensor_plans
from services.gpu_worker.compiler.programs import CompiledMethod
from services.gpu_worker.compiler.rematerialize import Policy, policy_keeping
from services.gpu_worker.compiler.sizes import Sizes
from services.gpu_worker.dry_run import (
    FORMS,
    Form,
    cache_bytes_per_token,
    prepare_forms,
    second_layout_bytes,
    sequence_bytes,
    trainable_bytes,
    weight_bytes,
)
from services.gpu_worker.dry_window import window_bytes
from services.gpu_worker.finetune.policies import LayerPolicies, fit
from services.gpu_worker.kernels.allocations import planned_kernels
from services.gpu_worker.kernels.backend import TORCH, Kernels
from services.gpu_worker.model.config import ModelConfig, UnsupportedModel
from services.gpu_worker.model.layouts import ONE_RANK, Layout
from services.gpu_worker.model.peft import check_method, num_virtual_tokens
from services.gpu_worker.model.shards import rank_parameters
from services.gpu_worker.plan import (
    AdapterPlan,
    CandidatePlan,
    MemoryPlan,
    Operations,
    Plan,
    PolicyPlan,
    RankPlan,
    Request,
    WeightPlan,
    candidate_plans,
)
from services.gpu_worker.savings import Ablation, Flops, Step, baselines, recomputed_flops

HARDWARE: dict[str, Hardware] = {"h200": H200_NVLINK, "a100": A100_NVLINK, "cpu": CPU_GLOO}
MOST_EXTRA_PERCENT = 30.0  # of a token's FLOPs may be computed again where no budget is given


class Planner:
    """Raises UnsupportedModel or InvalidAdapter where the request cannot be planned.

    A rank decides what is kept, as the engine does; the same tensors are then counted for the whole model.
    """

    def __init__(self, request: Request, perplexity: Mapping[Form, float] | None = None) -> None:
        """`perplexity` was measured, in each form of the weights."""
        self.request, self.perplexity = request, dict(perplexity or {})
        self.config = ModelConfig.from_hf(request.hf_config)
        check_method(request.method, self.config)
        self._check_lengths()
        prepare_forms()
        self.kernels = planned_kernels(request.kernels, request.hardware != "cpu")
        self.compiled = self._compile(ONE_RANK, self.kernels)
        self.of_rank = self._compile(self.parallel.layout, self.kernels)
        self.sizes = Sizes.of(self.config, request.sequence_tokens)

    def _check_lengths(self) -> None:
        request, limit = self.request, self.config.max_position
        if not num_virtual_tokens(request.method) < request.sequence_tokens <= limit:
            raise UnsupportedModel(
                f"a sequence of {request.sequence_tokens} tokens: the model has {limit} positions, of which the "
                f"method takes {num_virtual_tokens(request.method)}"
            )

    def _compile(self, layout: Layout, kernels: Kernels) -> CompiledMethod:
        request = self.request
        return CompiledMethod(
            self.config,
            request.method,
            dtype=request.dtype,
            sequence_length=request.sequence_tokens,
            dropout=request.dropout > 0,
            layout=layout,
            kernels=kernels,
        )

    @property
    def window(self) -> int:
        return min(self.request.window_tokens, self.request.sequence_tokens)

    @cached_property
    def flops(self) -> Flops:
        compiled, method = self.compiled, self.request.method
        backward = 0.0
        if compiled.trains_layers:
            first = compiled.joint_graph(compiled.needs_embedding_gradient)
            backward = (self.config.num_layers - 1) * backward_flops(compiled.joint, self.sizes, method)
            backward += backward_flops(first, self.sizes, method)
        forward = self.config.num_layers * forward_flops(compiled.joint)
        return Flops(forward, backward, head_flops(self.config, method))

    # --- policies

    def whole(self, policy: Policy) -> Policy:
        """A rank's policy, counted for the whole model."""
        joint = self.compiled.joint
        return policy_keeping(joint, policy.kept, self.compiled.bytes_of(joint))

    def percent(self, policy: Policy) -> float:
        """What a rank's policy computes again, of a token's FLOPs."""
        return self.flops.percent(self.config.num_layers * self.whole(policy).flops_per_token)

    @cached_property
    def rank_policies(self) -> LayerPolicies:
        """Those of the engine for the budget; without one, the leanest at a bounded price."""
        compiled, budget = self.of_rank, self.request.budget_bytes
        if budget is not None:
            return fit(compiled, budget / self.request.sequence_tokens)
        allowed = [policy for policy in compiled.policies if self.percent(policy) <= MOST_EXTRA_PERCENT]
        return LayerPolicies.uniform(compiled, (allowed or compiled.policies)[-1])

    @cached_property
    def policies(self) -> LayerPolicies:
        return LayerPolicies(self.compiled, tuple(map(self.whole, self.rank_policies.chosen)))

    @property
    def fits_budget(self) -> bool | None:
        """None where there is none."""
        budget, reserve = self.request.budget_bytes, self.rank_policies.reserve
        size = reserve.bytes_per_token(self.request.dtype) * self.request.sequence_tokens
        return None if budget is None else size <= budget

    @property
    def programs(self) -> dict[str, str]:
        """The source of a rank's backward programs over torch's functions, by the layers that run them."""
        policies = replace(self.rank_policies, compiled=self._compile(self.parallel.layout, TORCH))
        found = {}
        if not policies.compiled.trains_layers:
            return {}
        for _, run in groupby(range(len(policies.chosen)), lambda i: (policies.chosen[i], i == 0)):
            own = list(run)
            name = f"layer {own[0]}" if len(own) == 1 else f"layers {own[0]} to {own[-1]}"
            found[name] = policies.program(own[0]).__self__.code  # type: ignore[attr-defined]
        return found

    # --- parts

    def plan(self) -> Plan:
        found, problem = self.baselines()
        is_shared = self.request.tensor_parallel > 1
        return Plan(
            request=self.request,
            num_layers=self.config.num_layers,
            tensors=self.tensors(),
            operations=self.operations(),
            flops=self.flops,
            policies=self.policy_plans(),
            extra_flops_percent=self.flops.percent(recomputed_flops(self.policies)),
            fits_budget=self.fits_budget,
            memory=self.memory(self.policies),
            weights=self.weights(),
            adapter=self.adapter(),
            baselines=found,
            baseline_problem=problem,
            ablation=self.ablation(),
            parallel=self.candidates(),
            rank=self.rank() if is_shared else None,
        )

    def tensors(self) -> list[TensorPlan]:
        return tensor_plans(self.compiled, self.sizes, self.policies.chosen)

    def operations(self) -> Operations:
        compiled = self.compiled
        joint = compiled.joint
        if not compiled.trains_layers:
            return Operations(joint.num_differentiated, 0, 0)
        first = compiled.joint_graph(compiled.needs_embedding_gradient)
        counts = num_backward_operations(joint), num_backward_operations(first)
        return Operations(joint.num_differentiated, *counts)

    def policy_plans(self) -> list[PolicyPlan]:
        if not self.compiled.trains_layers:
            return []
        num_layers, dtype = self.config.num_layers, self.request.dtype
        cache, rank_cache = (
            cache_bytes_per_token(config, dtype) / num_layers for config in (self.config, self.of_rank.config)
        )
        found = []
        for policy in self.of_rank.policies:
            whole = self.whole(policy)
            size = whole.bytes_per_token + cache
            found.append(
                PolicyPlan(
                    name=whole.name,
                    bytes_per_token_layer=size,
                    rank_bytes_per_token_layer=policy.bytes_per_token + rank_cache,
                    sequence_bytes=size * num_layers * self.request.sequence_tokens,
                    extra_flops_per_token=num_layers * whole.flops_per_token,
                    extra_flops_percent=self.percent(policy),
                    num_layers=self.rank_policies.chosen.count(policy),
                )
            )
        return found

    def memory(self, policies: LayerPolicies) -> MemoryPlan:
        """Of a sequence in these policies, of the whole model or of a rank."""
        request, config = self.request, policies.compiled.config
        cache = cache_bytes_per_token(config, request.dtype)
        tokens, window = request.sequence_tokens, self.window
        return MemoryPlan(
            activation_bytes=policies.reserve.bytes_per_token(request.dtype) * tokens,
            kv_bytes=cache * tokens,
            kv_bytes_per_token=cache,
            sequence=sequence_bytes(config, request.dtype, tokens, window, self.kernels),
            window=window_bytes(policies, request.quantise, tokens, window, request.dropout),
        )

    def weights(self) -> WeightPlan:
        request = self.request
        found: dict[Form, int] = {}
        for form in FORMS:
            try:
                found[form] = weight_bytes(self.config, request.dtype, form)
            except UnsupportedModel:
                if form == request.quantise:
                    raise
        return WeightPlan(found, self._second_layout(self.config), self.perplexity)

    def _second_layout(self, config: ModelConfig) -> int:
        request = self.request
        if request.hardware != "cpu":
            return 0
        return second_layout_bytes(config, request.dtype, request.quantise)

    def adapter(self, layout: Layout = ONE_RANK) -> AdapterPlan:
        """Of the whole model, or of one of a layout's ranks."""
        config, method, dtype = self.config, self.request.method, self.request.dtype
        number = sum(parameter.numel for parameter in rank_parameters(config, method, layout))
        weights = trainable_bytes(config, method, dtype, lambda own: own.weights.size_bytes, layout)
        gradient = trainable_bytes(config, method, dtype, lambda own: own.grad.nbytes, layout)
        total = trainable_bytes(config, method, dtype, lambda own: own.size_bytes, layout)
        return AdapterPlan(number, weights, gradient, total - weights - gradient)

    def baselines(self) -> tuple[list[Step], str | None]:
        request = self.request
        own = request.sequence_tokens - num_virtual_tokens(request.method)
        try:
            return baselines(request.hf_config, request.method, self.flops, own, request.dtype), None
        except BaselineUnavailable as error:
            return [], str(error)

    def ablation(self) -> list[Step]:
        request = self.request
        return Ablation(
            self.policies,
            self.flops,
            request.hf_config,
            request.quantise,
            request.sequence_tokens,
            self.window,
            request.dropout,
            cache_bytes_per_token(self.config, request.dtype) * request.sequence_tokens,
        ).steps()

    # --- several ranks

    @cached_property
    def parallel(self) -> ParallelPlan:
        request = self.request
        workload = Workload(tokens=self.window, element_size=request.dtype.itemsize)
        hardware = HARDWARE[request.hardware]
        return parallelize(self.config, request.method, request.tensor_parallel, hardware, workload)

    def candidates(self) -> list[CandidatePlan]:
        return [candidate for bypass in self.parallel.plans for candidate in candidate_plans(bypass)]

    def rank(self) -> RankPlan:
        request, config = self.request, self.of_rank.config
        weights = weight_bytes(config, request.dtype, request.quantise)
        memory = self.memory(self.rank_policies)
        return RankPlan(weights, self._second_layout(config), self.adapter(self.of_rank.layout), memory)
