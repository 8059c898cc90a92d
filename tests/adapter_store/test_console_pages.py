"""What the console shows of a registry in use."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psycopg
import pytest

from services.embedded import EmbeddedPostgres
from shared.config import Settings
from shared.db import make_engine, session_factory
from shared.messages import WorkerStatus
from shared.queue import InferenceWorkerQueue, open_redis
from tests.adapter_store.console_client import Operator
from tests.adapter_store.seed import Seeded, seed
from tests.servers import own_database

TEMPLATE = "seeded_console"


@pytest.fixture(scope="module")
def seeded(postgres: EmbeddedPostgres, postgres_admin: psycopg.Connection) -> Iterator[Seeded]:
    """Made once; each test has a copy of the database."""

    async def fill(url: str) -> Seeded:
        engine = make_engine(Settings(database_url=url), pooled=False)
        try:
            return await seed(session_factory(engine), "pepper", scale=0.04)
        finally:
            await engine.dispose()

    postgres_admin.execute(f"CREATE DATABASE {TEMPLATE} TEMPLATE migrated")
    yield asyncio.run(fill(postgres.url_of(TEMPLATE)))
    postgres_admin.execute(f"DROP DATABASE {TEMPLATE} WITH (FORCE)")


@pytest.fixture
def database_url(
    postgres: EmbeddedPostgres, postgres_admin: psycopg.Connection, seeded: Seeded
) -> Iterator[str]:
    with own_database(postgres, postgres_admin, TEMPLATE) as url:
        yield url


async def test_the_overview_tells_what_runs(operator: Operator, seeded: Seeded, settings: Settings) -> None:
    job_id = seeded.running[0][0].job_id
    with open_redis(settings.redis_url) as redis:
        for worker_id, age_s in (("worker-a", 0.0), ("worker-b", 99.0)):
            status = WorkerStatus(
                worker_id=worker_id,
                model="tiny",
                progress_age_s=age_s,
                free_blocks=25,
                total_blocks=100,
                memory_bytes={"weights": 3 << 30, "kv_cache": 2 << 30, "activations": 512 << 20},
                host_memory_bytes={"activations": 128 << 20, "kv_cache": 0},
                memory_limit_bytes=8 << 30
                if worker_id == "worker-a"
                else 0,  # the other is of an older version
                running=3,
                training_jobs=(job_id,),
                finetune_tokens_per_s=1200,
                inference_tokens_per_s=800,
            )
            InferenceWorkerQueue(redis, settings, worker_id).beat([], status)
    text = await operator.read("/")
    for words in ("1.6k", "2.4k", "75 %", "150 of 200 blocks", "Healthy", "Stalled", "returns-agent", "4"):
        assert words in text, words
    for words in ("5.5 GiB", "of 8.0 GiB", "3.0 GiB", "512.0 MiB", "128.0 MiB", "Activations"):
        assert words in text, words
    assert 'class="owner owner-kv_cache" x="37.500" width="25.000"' in text
    assert text.count('<span class="shares">') == 1
    assert "acme/support-bot" in text and "New fine-tuned model created" not in text.split("Events")[0]
    now = (await operator.get("/fleet.json")).json()
    assert now == {"inference_tokens_per_s": 1600, "finetune_tokens_per_s": 2400, "num_workers": 2}


async def test_jobs_are_found_by_status_tenant_and_words(operator: Operator, seeded: Seeded) -> None:
    def names(text: str) -> set[str]:
        known = (
            "discharge-letters",
            "sql-writer",
            "returns-agent",
            "icd-codes",
            "intent-router",
            "support-bot",
        )
        return {name for name in known if f">{name}</a>" in text}

    everything = await operator.read("/jobs")
    assert len(names(everything)) == 6 and everything.count("<polyline") >= 8
    assert "training_diverged" in everything
    for query, expected in {
        "status=active": {"discharge-letters", "sql-writer", "returns-agent"},
        "status=queued": {"discharge-letters"},
        "status=failed": {"intent-router"},
        "org=acme": {"support-bot", "returns-agent"},
        "org=acme&status=running": {"returns-agent"},
        "q=SUPPORT": {"support-bot"},
        "q=%25": set(),
        f"q={seeded.running[1][0].job_id}": {"sql-writer"},
        "status=nonsense": set(),
    }.items():
        assert names(await operator.read(f"/jobs?{query}")) == expected, query


async def test_a_job_is_shown_with_its_numbers(operator: Operator, seeded: Seeded) -> None:
    lease, story = seeded.running[0]
    text = await operator.read(f"/jobs/{lease.job_id}")
    for words in (
        "returns-agent",
        "Running",
        "cosine, 3% warm-up",
        "all linear layers",
        "5,210",
        "gpu-worker-7c1e",
    ):
        assert words in text, words
    assert 'hx-trigger="every 2s"' in text
    assert text.count("Cancel job") > 0 and ">Pause</button>" in text and ">Resume</button>" not in text
    answer = (await operator.get(f"/jobs/{lease.job_id}/curves.json")).json()
    last = round(story.steps * story.until)
    curves = answer["curves"]
    assert curves["step"] == list(range(1, last + 1))
    assert {len(column) for column in curves.values()} == {last}
    assert (answer["step"], answer["total_steps"], answer["is_over"]) == (last, story.steps, False)
    later = (await operator.get(f"/jobs/{lease.job_id}/curves.json?from_step={last}")).json()
    assert later["curves"]["step"] == [last]


async def test_a_job_is_shown_with_its_method(operator: Operator, seeded: Seeded) -> None:
    lora, prefix = [await operator.read(f"/jobs/{lease.job_id}") for lease, _ in seeded.running]
    assert ">LoRA</dd>" in lora and "<dt>Rank</dt>" in lora
    assert ">Prefix tuning</dd>" in prefix and "<dt>Virtual tokens</dt>" in prefix and ">30</dd>" in prefix
    assert "<dt>Rank</dt>" not in prefix and "<dt>Targets</dt>" not in prefix


async def test_a_finished_job_is_not_asked_for_again(operator: Operator, seeded: Seeded) -> None:
    text = await operator.read("/jobs?status=succeeded")
    job_id = text.split("/admin/jobs/ftjob-")[1].split('"')[0]
    page = await operator.read(f"/jobs/ftjob-{job_id}")
    assert "hx-trigger" not in page and "Cancel job" not in page and "Version 4" in page
    assert (await operator.get(f"/jobs/ftjob-{job_id}/curves.json")).json()["is_over"] is True


async def test_adapters_show_what_is_live_and_how_good_it_is(operator: Operator, seeded: Seeded) -> None:
    text = await operator.read("/adapters")
    assert "v4 · 10 %" in text and "2,046" in text and "acme/support-bot" in text
    assert ">support-bot</a>" not in await operator.read("/adapters?org=orchid")
    assert ">triage-notes</a>" not in await operator.read("/adapters?q=support")
    page = await operator.read(f"/adapters/{seeded.adapter_id}")
    for words in (
        "v3 live",
        "Roll back to v2",
        "staging",
        "Retired",
        "1,730",
        "Trained differently",
        "of requests to v4",
    ):
        assert words in page, words
    assert "−5" in page or "−4" in page  # the loss against the base model's


async def test_two_versions_are_compared_as_asked(operator: Operator, seeded: Seeded) -> None:
    page = await operator.read(f"/adapters/{seeded.adapter_id}?left=1&right=2")
    compared = page.split('id="compare"')[1].split("Aliases")[0]
    assert "</i>v1</th>" in compared and "</i>v2</th>" in compared
    assert "<td>Rank</td>" in compared and "Epochs" not in compared
    unknown = await operator.read(f"/adapters/{seeded.adapter_id}?left=77")
    assert "</i>v3</th>" in unknown.split('id="compare"')[1]


async def test_tenants_show_keys_and_usage_but_no_secret(operator: Operator, seeded: Seeded) -> None:
    assert "Northwind Legal" in await operator.read("/tenants")
    text = await operator.read("/tenants/acme")
    for words in ("nightly-jobs", "Revoked", "never", ":support-bot:", "sk-flexllm-"):
        assert words in text, words
    assert "key_hash" not in text


async def test_the_audit_log_is_searched_and_paged(operator: Operator, seeded: Seeded) -> None:
    assert "version.retire" in await operator.read("/audit")
    assert ">alias.move</span>" not in await operator.read("/audit?action=version.publish")
    assert ">version.publish</span>" not in await operator.read(f"/audit?object={seeded.adapter_id}")
    text = await operator.read("/audit?before=5")
    assert text.count("<tr>") == 5  # the head and lines 4 to 1
