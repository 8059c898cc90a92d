"""Engines that follow another: the same calls, the same decisions, and an end where they differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch

from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.group import Channel, GroupEngine, OutOfStep
from services.gpu_worker.engine.requests import InvalidRequest
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.model.parallel import Group
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import generate, make_config, prompt_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@contextmanager
def pair(folder: Path) -> Iterator[tuple[GroupEngine, GroupEngine]]:
    """Rank 0 and one that follows it, each with all of the model: they share decisions and no tensors."""
    torch.set_num_threads(1)
    theirs, ours = Pipe(duplex=False)
    second = Group()
    second.rank = 1
    with theirs, ours:
        config = make_config(folder)
        yield GroupEngine(config, Group(), Channel(ours)), GroupEngine(config, second, Channel(theirs))


def ask(engine: Engine, request_id: str) -> None:
    engine.add(request_id, prompt_of(engine, 9), Sampling(max_tokens=4))


def test_a_follower_ends_where_rank_0_is(folder: Path) -> None:
    with pair(folder) as (first, second):
        generate(first, prompt_of(first, 20), Sampling(max_tokens=6, temperature=1.0))
        ask(first, "r")
        first.step()
        with pytest.raises(InvalidRequest, match="already running"):
            ask(first, "r")
        first.close()
        second.follow()
        states = [
            (e.blocks.num_free_blocks, [(s.request_id, s.tokens, s.block_table) for s in e.scheduler.running])
            for e in (first, second)
        ]
        assert states[0] == states[1] and states[0][1]


def test_a_rank_with_another_batch_ends_before_it_computes(folder: Path) -> None:
    with pair(folder) as (first, second):
        ask(first, "r")
        Engine.add(second, "r2", [5], Sampling(max_tokens=2))  # nobody told it
        first.step()
        with pytest.raises(OutOfStep, match=r"rank 1 would compute .*'r2', 0, 1.* where rank 0 computes"):
            second.follow()


def test_a_rank_with_nothing_to_compute_ends_where_rank_0_computes(folder: Path) -> None:
    with pair(folder) as (first, second):
        Engine.add(first, "r", [5], Sampling(max_tokens=2))
        first.step()
        with pytest.raises(OutOfStep, match="a Call was due, but rank 0 sent Plan"):
            second.follow()


def test_a_rank_that_refuses_what_rank_0_took_ends(folder: Path) -> None:
    with pair(folder) as (first, second):
        Engine.add(second, "r", [5], Sampling(max_tokens=2))
        ask(first, "r")
        first.abort("nobody's")
        with pytest.raises(OutOfStep, match="rank 1: InvalidRequest where rank 0 had None"):
            second.follow()


def test_a_follower_whose_rank_0_is_gone_ends(folder: Path) -> None:
    with pair(folder) as (first, second):
        first._channel._pipes[0].close()
        with pytest.raises(EOFError):
            second.follow()
