"""Latency models on disk: what a start measures, the next one reads, as long as it is true."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.fit import Extent, fit
from services.gpu_worker.engine.latency import LatencyModel, Work
from services.gpu_worker.engine.profile_cache import ProfileCache
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.parallel import ALONE
from services.gpu_worker.model.peft import LoraConfig
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import TARGETS, generate, make_engine, prompt_of, run
from tests.gpu_worker.test_fit import EXTENT, VirtualMachine
from tests.gpu_worker.training import make_dataset
from tests.gpu_worker.virtual import times


def make_model(disturbed: float = 0.3) -> LatencyModel:
    return fit(VirtualMachine(disturbed=disturbed), EXTENT)


@pytest.fixture
def cache(tmp_path: Path) -> ProfileCache:
    return ProfileCache(tmp_path / "profiles", {"device": "virtual", "threads": 2})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_what_is_kept_predicts_the_same(cache: ProfileCache) -> None:
    assert cache.load(ALONE) is None
    model = make_model()
    cache.save(model, ALONE)
    kept = cache.load(ALONE)
    assert kept is not None and times(kept) == times(model)
    assert [path.name for path in cache.folder.iterdir()] == [cache.path.name]


def test_another_key_is_another_file(cache: ProfileCache) -> None:
    cache.save(make_model(), ALONE)
    other = replace(cache, key={**cache.key, "threads": 4})
    assert other.path != cache.path and other.load(ALONE) is None


@pytest.mark.parametrize("damage", ["nothing", "half", "no curve", "no time", "a list"])
def test_a_damaged_file_is_ignored_with_a_line_in_the_log(
    cache: ProfileCache, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache.save(make_model(), ALONE)
    text = cache.path.read_text()
    found: dict[str, Any] = json.loads(text)
    if damage == "no curve":
        found["latency"]["forward"]["sizes"].pop()
    if damage == "no time":
        found["latency"]["optimizer_ms"] = -1.0
    texts = {"nothing": "", "half": text[: len(text) // 2], "a list": "[1, 2]"}
    cache.path.write_text(texts.get(damage, json.dumps(found)))
    with caplog.at_level(logging.WARNING):
        assert cache.load(ALONE) is None
    assert cache.path.name in caplog.text and "ignored" in caplog.text


def test_a_folder_that_cannot_be_made_costs_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = ProfileCache(tmp_path / "file" / "profiles", {})
    with caplog.at_level(logging.WARNING):
        cache.save(make_model(), ALONE)
    assert "cannot be kept" in caplog.text


# --- engines


def make_measured_engine(folder: Path, **options: Any) -> Engine:
    return make_engine(folder, latency=None, **options)


def test_an_engine_that_is_told_how_fast_its_machine_is_measures_nothing(
    folder: Path, tmp_path: Path
) -> None:
    given = make_model(disturbed=0.0)
    first, second = (make_engine(folder, latency=given, profile_dir=tmp_path) for _ in range(2))
    assert times(first.scheduler.latency) == times(given) and not list(tmp_path.iterdir())
    busy(first)
    assert first.scheduler.latency.errors()["iteration"].count > 5
    assert second.scheduler.latency.errors()["iteration"].count == given.errors()["iteration"].count == 0


def kept_file(profiles: Path) -> Path:
    [path] = profiles.iterdir()
    return path


def test_an_engine_keeps_a_profile_for_each_machine_and_configuration(folder: Path, tmp_path: Path) -> None:
    make_measured_engine(folder, profile_dir=tmp_path)
    key = json.loads(kept_file(tmp_path).read_text())["key"]
    assert key["dtype"] == "torch.float32" and key["form"] == "none" and key["threads"] == 1
    make_measured_engine(folder, profile_dir=tmp_path, quantise="int8")
    make_measured_engine(folder, profile_dir=tmp_path, scheduler={"max_num_seqs": 3})
    assert len(list(tmp_path.iterdir())) == 3


def test_an_engine_measures_again_what_does_not_hold(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make_measured_engine(folder, profile_dir=tmp_path).scheduler.latency
    path = kept_file(tmp_path)
    found = json.loads(path.read_text())
    found["latency"]["decodes"]["times_ms"] = [1e6 for _ in found["latency"]["decodes"]["times_ms"]]
    path.write_text(json.dumps(found))
    with caplog.at_level(logging.WARNING):
        again = make_measured_engine(folder, profile_dir=tmp_path).scheduler.latency
    assert "not as fast" in caplog.text
    decodes = Work(decodes=4, keys=200)
    assert first.table_forward_ms(decodes) < 1e4 and again.table_forward_ms(decodes) < 1e4
    assert max(json.loads(path.read_text())["latency"]["decodes"]["times_ms"]) < 1e4


def busy(engine: Engine) -> None:
    """A job beside requests that come and go."""
    rows = make_dataset([60, 90, 40, 70], engine.model.config.vocab_size)
    engine.add_job("job", JobConfig(n_epochs=12, batch_size=2), LoraConfig(8, 16.0, TARGETS), rows)
    for number in range(6):
        generate(engine, prompt_of(engine, 30, seed=number), Sampling(max_tokens=12))
    run(engine)


def test_an_engine_knows_how_long_its_iterations_take(folder: Path) -> None:
    """Within a loose factor, for other tests may run beside this one."""
    engine = make_measured_engine(folder)
    busy(engine)
    errors = engine.scheduler.latency.errors()
    assert all(errors[part].count > 5 for part in ("iteration", "windows", "first_backward_steps"))
    assert errors["iteration"].p50 < 3.0


def test_a_profile_leaves_no_job_behind(folder: Path) -> None:
    engine = make_measured_engine(folder)
    assert not engine.runner.trainers and not engine.has_work
    assert isinstance(engine.scheduler.latency, LatencyModel)


def test_an_extent_is_no_larger_than_the_cache(folder: Path, tmp_path: Path) -> None:
    make_measured_engine(folder, profile_dir=tmp_path, num_blocks=64, scheduler={"finetune_window": 300})
    extent = Extent(**json.loads(kept_file(tmp_path).read_text())["key"]["extent"])
    assert extent.keys == 256 and extent.rows == extent.window == extent.sequence == extent.context == 256
