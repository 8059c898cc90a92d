"""The search for a parallel layout of every bypass beside a fixed tensor-parallel backbone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.gpu_worker.compiler.parallel_cost import (
    A100_NVLINK,
    CPU_GLOO,
    H200_NVLINK,
    Hardware,
    Workload,
)
from services.gpu_worker.compiler.parallelize import BypassPlan, ParallelPlan, parallelize
from services.gpu_worker.model.config import ModelConfig, RopeConfig, UnsupportedModel
from services.gpu_worker.model.layouts import MOVES, ONE_RANK, Collective, Layout, Move, Split, State
from services.gpu_worker.model.peft import (
    EMBEDDING,
    HEAD,
    BottleneckConfig,
    Ia3Config,
    InvalidAdapter,
    LoraConfig,
    Method,
    PrefixConfig,
    PromptConfig,
)

LLAMA_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    rms_norm_eps=1e-5,
    max_position=8192,
    rope=RopeConfig(),
)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraConfig(rank=16, alpha=32, targets=LINEARS)
METHODS: tuple[Method, ...] = (
    replace(LORA, targets=(*LINEARS, EMBEDDING, HEAD)),
    replace(LORA, dora=True),
    Ia3Config(),
    Ia3Config(targets=("q_proj", "o_proj"), feedforward=()),
    BottleneckConfig(size=64),
    BottleneckConfig(size=64, targets=LINEARS, parallel=True),
    PrefixConfig(num_virtual_tokens=8),
    PromptConfig(num_virtual_tokens=8),
)
IDEAL = Hardware("nothing costs", flops=1e30, memory_bandwidth=1e30, link_bandwidth=1e30, link_latency=0.0)


def plan(
    method: Method = LORA, tp: int = 4, hardware: Hardware = H200_NVLINK, workload: Workload | None = None
) -> ParallelPlan:
    return parallelize(LLAMA_8B, method, tp, hardware, workload)


def described(bypass: BypassPlan) -> dict[str, tuple[list[str], list[str], list[str]]]:
    """Name -> collectives of the forward, of the backward, gradients that are reduced once a step."""
    return {
        candidate.name: (
            [str(collective) for collective in candidate.forward_collectives],
            [str(collective) for collective in candidate.backward_collectives],
            [step.subject for step in candidate.steps],
        )
        for candidate in bypass.candidates
    }


def test_lora_beside_a_column_parallel_linear_has_exactly_the_papers_four_candidates() -> None:
    for site in ("qkv", "gate_up"):
        assert described(plan().plan_of(site)) == {
            "①+④": ([], [], ["A"]),
            "②+④": (["all_reduce"], ["all_reduce"], []),
            "③+③": (["all_to_all"], ["all_to_all"], ["A", "B"]),
            "③+④": (["all_gather"], ["reduce_scatter"], ["A"]),
        }


def test_lora_beside_a_row_parallel_linear_may_ride_in_the_backbones_all_reduce() -> None:
    for site in ("o", "down"):
        candidates = described(plan().plan_of(site))
        assert candidates == {
            "②+①": ([], [], ["B"]),
            "②+④": (["all_reduce"], ["all_reduce"], []),
            "②+③": (["reduce_scatter"], ["all_gather"], ["B"]),
            "③+③": (["all_to_all"], ["all_to_all"], ["A", "B"]),
            "①+④": (["all_gather"], ["all_reduce"], []),
        }
        natural = plan().plan_of(site).chosen
        assert natural.name == "②+①"
        assert natural.shardings == (("A", Split.IN), ("B", None))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_every_candidate_starts_and_ends_in_the_backbones_states(method: Method, tp: int) -> None:
    for bypass in plan(method, tp).plans:
        backbone = bypass.site.attachment
        for candidate in bypass.candidates:
            forward, backward = candidate.composition.forward, candidate.composition.backward
            rules = candidate.composition.rules
            assert (forward[0].source, forward[-1].target) == (backbone.x, backbone.y)
            assert (backward[0].source, backward[-1].target) == (backbone.dy, backbone.dx)
            assert [move.target for move in forward[:-1]] == [rule.x for rule in rules]
            assert [move.source for move in forward[1:]] == [rule.y for rule in rules]
            assert [move.target for move in backward[:-1]] == [rule.dy for rule in reversed(rules)]
            assert [move.source for move in backward[1:]] == [rule.dx for rule in reversed(rules)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_one_rank_has_one_candidate_and_talks_to_nobody(method: Method) -> None:
    for bypass in plan(method, tp=1).plans:
        (candidate,) = bypass.candidates
        assert not candidate.forward_collectives + candidate.backward_collectives
        assert not candidate.steps
        assert candidate.cost.collectives == candidate.cost.step == 0


def test_an_activation_lets_no_sum_pass_unreduced() -> None:
    adapter = BottleneckConfig(size=64, targets=("q_proj", "down_proj"), parallel=True)
    assert set(described(plan(adapter).plan_of("q_proj"))) == {"①+④", "②+④", "③+③", "③+④"}
    across = plan(adapter).plan_of("down_proj")
    assert set(described(across)) == {"②+①", "①+①"}
    assert described(across)["②+①"] == (
        ["all_reduce"],
        [],
        [],
    )  # of the hidden features, fewer than those read


def test_what_is_chosen_is_what_ranks_are_told_to_execute() -> None:
    found = plan(replace(LORA, rank=128), hardware=CPU_GLOO)
    chosen = {bypass.site.name: bypass.chosen.composition for bypass in found.plans}
    assert found.layout == Layout(4, chosen)
    assert chosen["qkv"].name == "②+④"  # A's product and its bytes are worth sharing out
    assert plan(tp=1).layout == ONE_RANK


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_outside_the_layers_every_rank_computes_all(name: str) -> None:
    method = LoraConfig(rank=1024, alpha=16, targets=(name,))
    (candidate,) = plan(method, hardware=CPU_GLOO).plan_of(name).candidates
    assert (candidate.name, candidate.steps) == ("①+①", ())


def test_a_serial_adapter_behind_the_all_reduce_is_replicated_and_needs_no_sums() -> None:
    chosen = plan(BottleneckConfig(size=64)).plan_of("down_proj").chosen
    assert (chosen.name, chosen.steps) == ("①+①", ())


def test_vectors_follow_the_features_they_scale() -> None:
    scales = plan(Ia3Config())
    assert {p.site.name: p.chosen.shardings[0][1] for p in scales.plans} == {
        "k_proj": Split.OUT,
        "v_proj": Split.OUT,
        "down_proj": Split.OUT,  # scales what the linear reads
    }
    behind = plan(Ia3Config(targets=("o_proj",), feedforward=())).plan_of("o_proj")
    assert behind.chosen.shardings == (("o_proj", None),)
    assert plan(PrefixConfig(4)).plan_of("prefix").chosen.shardings == (("prefix", Split.OUT),)
    assert plan(PromptConfig(4)).plan_of("prompt").chosen.shardings == (("prompt", None),)


def test_doras_norms_are_read_where_the_weight_lies() -> None:
    dora = plan(replace(LORA, dora=True))
    column = {c.name: [step.subject for step in c.steps] for c in dora.plan_of("qkv").candidates}
    assert (column["①+④"], column["②+④"]) == (["A"], ["A"])
    gathered = next(c for c in dora.plan_of("qkv").candidates if c.name == "②+④").steps[0]
    assert gathered.collective is Collective.ALL_GATHER
    row = {c.name: [step.subject for step in c.steps] for c in dora.plan_of("o").candidates}
    assert (row["②+①"], row["②+④"]) == (["B", "squared norms"], ["B", "squared norms"])
    assert dora.plan_of("qkv.magnitude").chosen.shardings == (("magnitude", Split.OUT),)
    assert dora.plan_of("o.magnitude").chosen.shardings == (("magnitude", None),)


def test_a_split_parameter_takes_its_share_of_the_memory() -> None:
    by_name = {candidate.name: candidate for candidate in plan().plan_of("qkv").candidates}
    num_a, num_b = 48 * 4096, 16 * (4096 + 2 * 1024)
    a_byte_each = 2 + 4 + 8 + 4  # weight, master weight, moments, gradient
    assert by_name["③+③"].weight_bytes == a_byte_each * (num_a + num_b)
    assert by_name["①+④"].weight_bytes == a_byte_each * (num_a + num_b // 4)
    assert by_name["②+④"].weight_bytes == a_byte_each * (num_a + num_b) // 4


@pytest.mark.parametrize(
    ("changes", "workload", "site", "expected"),
    [
        ({"link_latency": 1e-3}, Workload(), "qkv", "①+④"),  # every transfer hurts: the one that makes none
        ({"memory_bandwidth": 1e9}, Workload(), "qkv", "②+④"),  # bytes hurt: the one that keeps fewest
        # flops hurt and links a little: A's product shared out, and a gather has half of a sum's bytes
        ({"flops": 1e12, "link_bandwidth": 1e10}, Workload(iterations_per_step=10**6), "qkv", "③+④"),
        ({"link_latency": 1e-3}, Workload(), "o", "②+①"),
        # a step after every token: the sum of B's gradient outweighs the sums of the rank-r tensor
        ({"link_bandwidth": 1e9}, Workload(tokens=1, iterations_per_step=1), "o", "②+④"),
    ],
)
def test_the_hardware_decides_among_the_candidates(
    changes: dict[str, float], workload: Workload, site: str, expected: str
) -> None:
    hardware = replace(IDEAL, **changes)  # type: ignore[arg-type]
    assert plan(hardware=hardware, workload=workload).plan_of(site).chosen.name == expected


def test_an_all_to_all_pays_where_the_output_is_narrower_than_the_rank() -> None:
    narrow = replace(LLAMA_8B, num_heads=4, num_kv_heads=4, head_dim=8)
    method = LoraConfig(rank=256, alpha=256, targets=("k_proj",))
    hardware = replace(IDEAL, flops=1e12, link_bandwidth=1e10)
    found = parallelize(narrow, method, 4, hardware, Workload(iterations_per_step=10**6))
    assert found.plan_of("qkv").chosen.name == "③+③"


@pytest.mark.parametrize("hardware", [H200_NVLINK, A100_NVLINK, CPU_GLOO], ids=lambda h: h.name)
def test_the_presets_avoid_transfers_in_every_iteration(hardware: Hardware) -> None:
    chosen = {bypass.site.name: bypass.chosen.name for bypass in plan(hardware=hardware).plans}
    assert chosen == {"qkv": "①+④", "o": "②+①", "gate_up": "①+④", "down": "②+①"}


def test_candidates_are_ordered_by_cost_and_ties_by_form() -> None:
    free = plan(
        hardware=replace(
            IDEAL, memory_bandwidth=float("inf"), link_bandwidth=float("inf"), flops=float("inf")
        )
    )
    for bypass in free.plans:
        assert [candidate.cost_us for candidate in bypass.candidates] == [0.0] * len(bypass.candidates)
        assert [c.forms for c in bypass.candidates] == sorted(c.forms for c in bypass.candidates)
    for bypass in plan().plans:
        costs = [candidate.cost_us for candidate in bypass.candidates]
        assert costs == sorted(costs)
    assert plan() == plan()


def test_the_adjoint_that_moves_fewer_bytes_is_taken() -> None:
    """Behind the all-reduce ①+④ may sum the rank-r gradient or the wide one."""
    serial = plan(BottleneckConfig(size=64, targets=("down_proj",))).plan_of("down_proj")
    candidate = next(c for c in serial.candidates if c.name == "①+④")
    assert [move.collective for move in candidate.composition.backward] == [
        Collective.PARTITION,
        Collective.ALL_REDUCE,
        Collective.KEEP,
    ]


def test_a_transfer_is_priced_by_what_a_rank_sends() -> None:
    shares = {c: c.wire_share(4) for c in Collective}
    assert shares == {
        Collective.KEEP: 0,
        Collective.PARTITION: 0,
        Collective.PAD: 0,
        Collective.REPLICATE: 1,
        Collective.ALL_GATHER: 3 / 4,
        Collective.REDUCE_SCATTER: 3 / 4,
        Collective.ALL_REDUCE: 3 / 2,
        Collective.ALL_TO_ALL: 3 / 16,
    }
    assert all(collective.wire_share(1) == 0 for collective in Collective)


def test_a_replicated_tensor_never_becomes_a_sum_nor_a_sum_whole_by_itself() -> None:
    assert not Move(State.REPLICATED, State.PARTIAL).is_possible
    assert MOVES[State.PARTIAL, State.REPLICATED] is Collective.ALL_REDUCE


@pytest.mark.parametrize(
    ("tp", "changes", "message"),
    [
        (16, {}, "16 ranks: they cannot share 8 key/value heads evenly"),
        (3, {"num_kv_heads": 3}, "cannot share 32 attention heads"),
        (3, {"num_kv_heads": 3, "num_heads": 9}, "cannot share 14336 features of the feed-forward layer"),
        (0, {}, "at least one is needed"),
    ],
)
def test_ranks_that_cannot_share_the_backbone_evenly_are_refused(
    tp: int, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        parallelize(replace(LLAMA_8B, **changes), LORA, tp)  # type: ignore[arg-type]


def test_a_target_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(InvalidAdapter, match="no target 'c_proj'"):
        plan(replace(LORA, targets=("c_proj",)))


def test_a_dimension_that_does_not_divide_is_not_split() -> None:
    odd = replace(LLAMA_8B, hidden_size=4098, vocab_size=128255)
    method = LoraConfig(rank=16, alpha=32, targets=("q_proj", "o_proj"))
    found = parallelize(odd, method, 4)
    assert set(described(found.plan_of("qkv"))) == {"①+④", "③+③", "③+④"}
    assert set(described(found.plan_of("o"))) == {"②+①", "②+③", "③+③"}
