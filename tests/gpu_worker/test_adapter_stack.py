"""Adapters of a CPU's decodes in one pair of products: in bfloat16, which is what gains by it."""

from __future__ import annotations

import pytest
import torch

from services.gpu_worker.engine.admission import USUAL_RANK
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.memory import FINETUNE_SHARE
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.kernels.linear import gains_by_packing
from services.gpu_worker.model.adapter_pool import AdapterPool
from services.gpu_worker.model.adapter_stack import AdapterStack, AdapterStacks, StackedRows, can_stack
from services.gpu_worker.model.adapters import AdapterWeights
from services.gpu_worker.model.context import AdapterRun, RunByRun
from services.gpu_worker.model.low_rank import Stacked, low_rank_of
from services.gpu_worker.model.peft import GROUPS, LoraConfig, Method
from services.gpu_worker.model.peft_files import read_peft
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import METHODS, TARGETS, generate, make_adapter, make_engine, prompt_of, run

MIXED: list[Method] = [
    LoraConfig(2, 8.0, ("q_proj", "v_proj")),
    LoraConfig(16, 8.0, TARGETS),
    LoraConfig(3, 8.0, ("down_proj",)),
    LoraConfig(4, 8.0, TARGETS, dora=True),
]
pytestmark = pytest.mark.skipif(
    not gains_by_packing(torch.device("cpu"), torch.bfloat16),
    reason="oneDNN computes no bfloat16 on this processor",
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "qwen2", tied=False)
    return make_engine(folder, dtype="bfloat16", num_blocks=512)


def adapters_of(engine: Engine, methods: list[Method], std: float = 0.2) -> list[AdapterWeights]:
    found = []
    for seed, method in enumerate(methods):
        files = make_adapter(engine.model.config, method, seed=seed, std=std)
        found.append(read_peft(engine.model.weights, files, 16))
    return found


def whole(stack: AdapterStack) -> AdapterStack:
    while not stack.is_whole:
        stack.grow(1 << 20)
    return stack


def test_rows_get_what_their_own_adapter_adds(engine: Engine) -> None:
    """Rows of the base model lie between; the error is that of rounding to bfloat16."""
    adapters = adapters_of(engine, MIXED)
    owners = [0, 0, 1, -1, -1, 2, 3, 3, 3]
    rows = StackedRows(whole(AdapterStack(adapters)), slice(2, 11), owners)
    for layer in range(engine.model.config.num_layers):
        for number, group in enumerate(GROUPS):
            linear = engine.model.weights.layers[layer].linear(group)
            x = torch.randn(13, linear.in_features).bfloat16()
            before = torch.randn(13, linear.out_features).bfloat16()
            expected = before.double()
            for row, owner in enumerate(owners, start=2):
                pairs = adapters[owner].low_rank_pairs if owner >= 0 else None
                pair = pairs.layers[layer][number] if pairs else None
                if pair is not None:
                    expected[row] += x[row].double() @ pair[0].double().T @ pair[1].double().T
            rows.add_(y := before.clone(), x, layer, group)
            assert (y.double() - expected).norm() < 1e-2 * expected.norm()
            assert y[[0, 1, 5, 6, 11, 12]].equal(before[[0, 1, 5, 6, 11, 12]])


def test_decodes_of_many_adapters_agree_with_each_alone(engine: Engine) -> None:
    """The log-probabilities of what they drew, beside those of a prompt that is computed at once."""
    outputs, prompts = {}, {}
    for index, method in enumerate(MIXED * 2):
        digest = f"{index % len(MIXED)}" * 64
        engine.load_adapter(digest, make_adapter(engine.model.config, method, seed=index % len(MIXED)))
        prompts[f"r{index}"] = prompt_of(engine, 8 + index, index)
        engine.add(f"r{index}", prompts[f"r{index}"], Sampling(max_tokens=12, logprobs=0), adapter=digest)
    before = engine.adapters.size_bytes
    outputs, _ = run(engine, *prompts)
    assert engine.adapters.size_bytes > before and engine.memory().device["adapters"] > before
    for index, (name, prompt) in enumerate(prompts.items()):
        sampling = Sampling(max_tokens=0, prompt_logprobs=0)
        whole_prompt, digest = prompt + outputs[name].tokens, f"{index % len(MIXED)}" * 64
        again = generate(engine, whole_prompt, sampling, adapter=digest, cache_salt=name).prompt_logprobs
        assert again is not None
        for drawn, alone in zip(outputs[name].logprobs, again[len(prompt) :], strict=True):
            assert alone is not None and abs(drawn.logprob - alone.logprob) < 0.1


def test_an_adapter_that_overflows_stays_alone(engine: Engine) -> None:
    calm, wild = adapters_of(engine, MIXED[:1])[0], adapters_of(engine, MIXED[1:2])[0]
    assert can_stack(calm) and can_stack(wild)
    bypass = wild.layers[-1]["down"]
    assert bypass.b is not None
    bypass.b[0, 0] = float("inf")
    assert not can_stack(wild)


def test_what_has_no_low_rank_part_is_not_stacked(engine: Engine) -> None:
    for weights in adapters_of(engine, [METHODS["ia3"], METHODS["serial"], METHODS["prompt"]]):
        assert not can_stack(weights)


def test_a_stack_grows_bit_by_bit_while_the_one_before_serves(engine: Engine) -> None:
    first, second, third, _ = adapters_of(engine, MIXED)
    stacks = AdapterStacks()
    assert stacks.serve([first]) is None and not stacks.size_bytes
    ready = None
    for _ in range(50):
        ready = ready or stacks.serve([first, second], 1)
    assert ready is not None and ready.is_whole and first in ready and second in ready
    size = stacks.size_bytes
    assert stacks.serve([first, third], 1) is ready and stacks.size_bytes > size
    while stacks.serve([first, third], 1) is ready:
        assert stacks.size_bytes > size
    newest = stacks.serve([first, third], 1)
    assert newest is not None and third in newest and second not in newest
    stacks.forget(second)
    assert stacks.serve([third, first], 1) is newest
    stacks.forget(third)
    assert not stacks.size_bytes


def test_room_for_all_adapters_and_copies_is_not_given_to_jobs(engine: Engine) -> None:
    capacity, left = 4, 1 << 30
    admission, stacks = engine.admission, AdapterStacks()
    before, budgets = admission.budget, []
    for max_adapters in (0, capacity):
        admission.set_budget(0, left, max_adapters)
        budgets.append(admission.budget)
    admission.budget = before
    adapters = adapters_of(engine, [LoraConfig(USUAL_RANK, 8.0, TARGETS)] * capacity)
    sizes = []
    for served in (adapters[:3], adapters):  # the second is made while the first serves
        for _ in range(len(GROUPS) * engine.model.config.num_layers):
            stacks.serve(served, 1)
            sizes.append(stacks.size_bytes)
    own = sum(adapter.size_bytes for adapter in adapters)
    assert own < max(sizes), "two stacks at once"
    assert own + max(sizes) <= (budgets[0] - budgets[1]) / FINETUNE_SHARE["cpu"]


def test_the_few_rows_at_the_end_go_together_and_the_rest_run_by_run(engine: Engine) -> None:
    pool = AdapterPool(4)
    for index, weights in enumerate(adapters_of(engine, MIXED[:3])):
        pool.load(str(index), weights)
    prompt, left, right = (pool.get(name) for name in "012")
    runs = [AdapterRun(0, 90, prompt), AdapterRun(90, 92, left), AdapterRun(93, 94, right)]
    weights = engine.model.weights
    while not isinstance(found := low_rank_of(runs, weights, pool), Stacked):
        assert isinstance(found, RunByRun)
    assert found.others.runs == runs[:1]
    training = [AdapterRun(0, 2, adapters_of(engine, MIXED[:1])[0]), AdapterRun(2, 3, left)]
    assert isinstance(low_rank_of(training, weights, pool), RunByRun)
    pool.load("3", adapters_of(engine, MIXED[3:])[0])
    for name in "12":
        pool.pin(name)
    pool.load("4", adapters_of(engine, MIXED[:1])[0])  # in the place of what nobody uses
    assert isinstance(low_rank_of(runs, weights, pool), Stacked)
    pool.unpin("2")
    for name in "34":
        pool.pin(name)
    size = pool.size_bytes
    pool.load("5", adapters_of(engine, MIXED[:1])[0])
    assert "2" not in pool and pool.size_bytes < size, "with an adapter go the stacks that have it"
