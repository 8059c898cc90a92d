"""Activations in host memory: what is read is what was saved, whoever is late, the copies or the device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.gpu_worker.compiler.programs import KeptTensor
from services.gpu_worker.finetune.activations import ActivationStore, Reserve
from services.gpu_worker.finetune.host_ring import CopyStream, ring_depth
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.peft import BottleneckConfig, LoraConfig
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import make_timeless_engine, run
from tests.gpu_worker.training import advance, make_dataset, make_trainer, make_transformer

NUM_LAYERS, CAPACITY = 6, 40
NARROW, WIDE = torch.bfloat16, torch.float32
TENSORS = {"x": KeptTensor("x", 3, False), "q": KeptTensor("q", 5, False), "lse": KeptTensor("lse", 2, True)}
LAYERS = (*[frozenset({"x", "lse"})] * 2, frozenset({"x"}), *[frozenset({"x", "q"})] * 3)
LORA = LoraConfig(4, 8.0, ("q_proj", "v_proj", "down_proj"))
LENGTHS = [30, 12, 25, 8, 33, 21]
CPU = torch.device("cpu")


@dataclass
class LateCopies:
    """Copies are done when something waits for them, or by chance before."""

    seed: int = 0
    num_done: int = 0
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def use(self, tensor: Tensor) -> None:
        pass

    def follow(self) -> None:
        pass

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.copies.append((target, source))
        if self._random.random() < 0.2:
            self.wait(self._random.randint(self.num_done, len(self.copies)))

    def mark(self) -> int:
        return len(self.copies)

    def wait(self, mark: object) -> None:
        end = mark if isinstance(mark, int) else 0
        for target, source in self.copies[self.num_done : end]:
            target.copy_(source)
        self.num_done = max(self.num_done, end)


@dataclass
class LateDevice:
    """Copies are done at once; the device reads what it was given to read only where copies have to follow it."""

    unread: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (from the store, what it should be)
    follows: bool = False

    def use(self, tensor: Tensor) -> None:
        pass

    def follow(self) -> None:
        self.read()
        self.follows = True

    def read(self) -> None:
        for found, expected in self.unread:
            assert torch.equal(found, expected)
        self.unread.clear()

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert self.follows
        target.copy_(source)

    def mark(self) -> None:
        self.follows = False

    def wait(self, mark: object) -> None:
        pass


Copies = LateCopies | LateDevice


def make_store(copies: Copies, num_host_layers: int, lanes: int) -> ActivationStore:
    reserve, depth = Reserve(TENSORS, LAYERS), ring_depth(lanes)
    return ActivationStore(reserve, CAPACITY, NARROW, WIDE, CPU, copies, num_host_layers, depth)


def cut(num_tokens: int, rng: random.Random) -> list[slice]:
    """Windows, in order."""
    cuts = sorted({0, num_tokens, *(rng.randrange(1, num_tokens) for _ in range(rng.randrange(5)))})
    return [slice(a, b) for a, b in pairwise(cuts)]


def backward_order(num_tokens: int, lanes: int, rng: random.Random) -> Iterator[tuple[int, slice]]:
    """Layers and windows from the last to the first; of two lanes one may be in the layer below."""
    left = [cut(num_tokens, rng) for _ in LAYERS]
    for layer in reversed(range(NUM_LAYERS)):
        while left[layer]:
            is_ahead = lanes > 1 and layer > 0 and len(left[layer - 1]) > 1 and rng.random() < 0.4
            chosen = layer - is_ahead
            yield chosen, left[chosen].pop()


class Sequence:
    """Random rows of every layer, saved and read again."""

    def __init__(self, store: ActivationStore, copies: Copies, num_tokens: int, rng: random.Random) -> None:
        self.store, self.copies, self.num_tokens, self.rng = store, copies, num_tokens, rng
        self.rows = [{label: self._draw(TENSORS[label]) for label in labels} for labels in LAYERS]

    def _draw(self, kept: KeptTensor) -> Tensor:
        return torch.rand(self.num_tokens, kept.width, dtype=WIDE if kept.wide else NARROW)

    def forward(self) -> Iterator[None]:
        if isinstance(self.copies, LateDevice):
            self.copies.read()  # the backward before it
        self.store.begin(self.num_tokens)
        for window in cut(self.num_tokens, self.rng):
            for layer, rows in enumerate(self.rows):
                for label in TENSORS:
                    given = rows[label][window].clone() if label in rows else torch.ones(1)
                    self.store.save(layer, label, window.start, given)
                    given.fill_(-1)  # as the layer does with what it needs no more
            yield

    def backward(self, lanes: int) -> Iterator[int]:
        for layer, window in backward_order(self.num_tokens, lanes, self.rng):
            kept = self.store.window(layer, window)
            for label, rows in self.rows[layer].items():
                found = kept[label]
                assert found is not None and torch.equal(found, rows[window])
                if isinstance(self.copies, LateDevice):
                    self.copies.unread.append((found, rows[window]))
            yield layer


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("num_host_layers", range(NUM_LAYERS + 1))
@pytest.mark.parametrize("late", ["copies", "device"])
@pytest.mark.parametrize("moves", [False, True], ids=["stays", "moves"])
def test_what_is_read_is_what_was_saved(moves: bool, late: str, num_host_layers: int, lanes: int) -> None:
    """Sequences of several lengths in windows of many sizes; all layers may move to host memory on the way."""
    for seed in range(6):
        rng = random.Random(seed)
        copies = LateCopies(seed) if late == "copies" else LateDevice()
        store = make_store(copies, num_host_layers, lanes)
        numbers, moves_at = count(1), rng.randrange(40) if moves else 0
        for num_tokens in (CAPACITY, 17, 25):
            sequence = Sequence(store, copies, num_tokens, rng)
            for _ in chain(sequence.forward(), sequence.backward(lanes)):
                if next(numbers) == moves_at:
                    store.move_to_host()
        assert store.num_host_layers == (NUM_LAYERS if moves_at else num_host_layers)


def test_layers_come_back_once_each_and_one_ahead() -> None:
    copies = LateCopies()
    store = make_store(copies, NUM_LAYERS, lanes=1)
    layers = {t.data_ptr(): layer for layer, buffers in enumerate(store._host) for t in buffers.values()}

    def came_back(begun: int) -> list[int]:
        sources = [source.data_ptr() for _, source in copies.copies[begun:]]
        return list(dict.fromkeys(layers[address] for address in sources if address in layers))

    for num_tokens in (CAPACITY, 17):
        sequence = Sequence(store, copies, num_tokens, random.Random(1))
        list(sequence.forward())
        begun = copies.mark()
        for layer in sequence.backward(lanes=1):
            assert came_back(begun) == list(range(NUM_LAYERS - 3, max(layer - 1, 0) - 1, -1))
        assert copies.mark() - begun == sum(len(labels) for labels in LAYERS[: NUM_LAYERS - 2])


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("num_host_layers", range(NUM_LAYERS + 1))
def test_what_is_held_is_what_a_plan_counts(num_host_layers: int, lanes: int) -> None:
    store = make_store(LateCopies(), num_host_layers, lanes)
    reserve, depth = store.reserve, ring_depth(lanes)
    per_layer = reserve.layer_bytes(NARROW)
    ring = reserve.ring_bytes(NARROW, num_host_layers, depth)
    assert store.host_bytes == CAPACITY * sum(per_layer[:num_host_layers])
    assert store.size_bytes == CAPACITY * (sum(per_layer[num_host_layers:]) + ring)


# --- in training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", tied=False, num_layers=NUM_LAYERS)


def gradient(
    folder: Path, num_host_layers: int, device: torch.device = CPU, copies: CopyStream | None = None
) -> Tensor:
    """Of a step of several sequences."""
    trainer = make_trainer(
        make_transformer(folder, device=device),
        make_dataset(LENGTHS, 384),
        method=LORA,
        policy=0,
        max_tokens_in_flight=70,
        num_host_layers=num_host_layers,
        copies=copies,
    )
    rng = random.Random(2)
    advance(trainer, lambda: rng.randint(5, 40))
    assert (trainer.memory.host_activations > 0) == (num_host_layers > 0)
    return trainer.parameters.grad


@pytest.mark.parametrize("num_host_layers", range(1, NUM_LAYERS + 1))
def test_gradients_stay_the_same_to_the_last_bit(folder: Path, num_host_layers: int) -> None:
    expected = gradient(folder, 0)
    assert torch.equal(gradient(folder, num_host_layers), expected)
    assert torch.equal(gradient(folder, num_host_layers, copies=LateCopies()), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies beside the computation need a GPU")
@pytest.mark.parametrize("num_host_layers", [1, 3, NUM_LAYERS])
def test_on_a_gpu_gradients_stay_the_same_to_the_last_bit(folder: Path, num_host_layers: int) -> None:
    expected = gradient(folder, 0, torch.device("cuda"))
    for _ in range(5):
        assert torch.equal(gradient(folder, num_host_layers, torch.device("cuda")), expected)


def test_several_jobs_share_nothing(folder: Path) -> None:
    methods = {"ftjob-1": LORA, "ftjob-2": BottleneckConfig(8, ("o_proj", "down_proj"), "gelu", 1.0)}
    exports = []
    for offload in ("never", "always"):
        options = {"offload_activations": offload, "finetune_tokens_in_flight": 70}
        engine = make_timeless_engine(folder, activation_bytes=100_000, **options)
        for job_id, method in methods.items():
            dataset = make_dataset(LENGTHS, engine.model.config.vocab_size)
            engine.add_job(job_id, JobConfig(n_epochs=2, batch_size=3), method, dataset)
        run(engine)
        assert (engine.memory().host["activations"] > 0) == (offload == "always")
        exports.append([engine.export_job(job_id, "tiny") for job_id in methods])
    assert exports[0] == exports[1]
