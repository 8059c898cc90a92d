"""Finetuning jobs as a customer makes, watches and steers them."""

from __future__ import annotations

import time

import openai
import psycopg
import pytest
import redis

from shared.messages import TrainSpec
from tests.api.conftest import Api


def row(api: Api, job_id: str, column: str) -> object:
    with psycopg.connect(api.settings.database_url.replace("+psycopg", ""), options="-c app.tenant=*") as db:
        return db.execute(f"SELECT {column} FROM ft_job WHERE id = %s", [job_id]).fetchone()[0]


def test_a_job_is_made_with_its_defaults_spelled_out(idle_api: Api, file_id: str) -> None:
    client = idle_api.openai()
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    assert job.id.startswith("ftjob-")
    assert (job.status, job.model, job.training_file) == ("validating_files", "tiny", file_id)
    assert (job.fine_tuned_model, job.finished_at, job.trained_tokens, job.error) == (None, None, None, None)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (3, 8)
    assert job.method.supervised.hyperparameters.learning_rate_multiplier == 1.0
    assert job.organization_id == "acme"
    assert job.flexllm["peft"]["rank"] == 16
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    [validating, created] = list(client.fine_tuning.jobs.list_events(job.id))
    assert "Validating" in validating.message
    assert (created.level, created.type, created.object) == ("info", "message", "fine_tuning.job.event")
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []


@pytest.mark.parametrize("is_deprecated", [False, True])
def test_hyperparameters_and_the_extension_become_the_spec(
    idle_api: Api, file_id: str, is_deprecated: bool
) -> None:
    chosen = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    method = {"type": "supervised", "supervised": {"hyperparameters": chosen}}
    job = idle_api.openai().fine_tuning.jobs.create(
        model="tiny",
        training_file=file_id,
        validation_file=file_id,
        suffix="My Bot",
        seed=42,
        metadata={"team": "a"},
        **({"hyperparameters": chosen} if is_deprecated else {"method": method}),
        extra_body={
            "flexllm": {
                "peft": {"rank": 8, "target_modules": ["v_proj", "q_proj"], "dropout": 0.5},
                "learning_rate": 0.001,
                "lr_schedule": "linear",
                "gradient_accumulation_steps": 2,
                "max_seq_len": 64,
                "max_steps": 10,
                "priority": 3,
                "promote": True,
            }
        },
    )
    spec = TrainSpec.model_validate(row(idle_api, job.id, "spec"))
    assert (spec.n_epochs, spec.batch_size, spec.learning_rate, spec.seed) == (2, 4, 0.0005, 42)
    assert (spec.peft.rank, spec.peft.alpha, spec.peft.dropout) == (8, 16.0, 0.5)
    assert spec.peft.target_modules == ("q_proj", "v_proj")
    assert (spec.lr_schedule, spec.gradient_accumulation_steps, spec.max_seq_len) == ("linear", 2, 64)
    assert spec.max_steps == 10
    assert (row(idle_api, job.id, "priority"), row(idle_api, job.id, "promote")) == (3, True)
    assert row(idle_api, job.id, "adapter_name") == "my-bot"
    assert (job.seed, job.metadata, job.validation_file) == (42, {"team": "a"}, file_id)
    assert job.hyperparameters.n_epochs == 2
    assert job.flexllm["peft"]["target_modules"] == ["q_proj", "v_proj"]
    assert job.flexllm["max_seq_len"] == 64


def test_auto_means_the_defaults(idle_api: Api, file_id: str) -> None:
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job = idle_api.openai().fine_tuning.jobs.create(model="tiny", training_file=file_id, hyperparameters=auto)
    assert job.hyperparameters.n_epochs == 3


def test_a_file_of_another_purpose_is_refused(idle_api: Api) -> None:
    file = idle_api.openai().files.create(file=("a", b"x"), purpose="user_data")
    with pytest.raises(openai.BadRequestError) as caught:
        idle_api.openai().fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert caught.value.param == "training_file"


def test_a_repeated_request_makes_one_job(idle_api: Api, file_id: str) -> None:
    client = idle_api.openai()
    body = {"model": "tiny", "training_file": file_id}
    first, again = client.fine_tuning.jobs.create(**body), client.fine_tuning.jobs.create(**body)
    assert first.id == again.id
    keyed = {"extra_headers": {"Idempotency-Key": "k1"}}
    third = client.fine_tuning.jobs.create(**body, **keyed)
    assert third.id != first.id
    replay = client.fine_tuning.jobs.with_raw_response.create(**body, **keyed)
    assert replay.parse().id == third.id
    assert replay.headers["idempotent-replayed"] == "true"
    with pytest.raises(openai.UnprocessableEntityError):
        client.fine_tuning.jobs.create(**body, seed=1, **keyed)


def test_jobs_are_listed_newest_first_in_pages_and_by_metadata(idle_api: Api, file_id: str) -> None:
    client = idle_api.openai()
    made = [
        client.fine_tuning.jobs.create(
            model="tiny", training_file=file_id, seed=i, metadata={"n": str(i % 2)} if i else openai.NOT_GIVEN
        ).id
        for i in range(5)
    ]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == made[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "1"})] == [made[3], made[1]]
    with idle_api.http() as http:
        without = http.get("/v1/fine_tuning/jobs", params={"metadata": "null"}).json()
        assert [job["id"] for job in without["data"]] == [made[0]]
        assert http.get("/v1/fine_tuning/jobs", params={"limit": "0"}).status_code == 400
    assert len(list(client.fine_tuning.jobs.list_events(made[0], limit=1))) == 2


def test_a_job_is_cancelled_and_stays_so(idle_api: Api, file_id: str) -> None:
    jobs = idle_api.openai().fine_tuning.jobs
    job = jobs.create(model="tiny", training_file=file_id)
    assert jobs.cancel(job.id).status == "cancelled"
    assert jobs.cancel(job.id).status == "cancelled"
    for act in (jobs.pause, jobs.resume):
        with pytest.raises(openai.ConflictError):
            act(job.id)


def test_a_queued_job_is_paused_and_resumed(idle_api: Api, file_id: str) -> None:
    jobs = idle_api.openai().fine_tuning.jobs
    job = jobs.create(model="tiny", training_file=file_id)
    url = idle_api.settings.database_url.replace("+psycopg", "")
    with psycopg.connect(url, options="-c app.tenant=*") as db:
        db.execute("UPDATE ft_job SET status = 'queued'")
    assert jobs.pause(job.id).status == "paused"
    assert jobs.resume(job.id).status == "queued"


def test_validation_is_sent_after_the_commit(idle_api: Api, file_id: str) -> None:
    job = idle_api.openai().fine_tuning.jobs.create(model="tiny", training_file=file_id)
    broker = redis.Redis.from_url(idle_api.settings.redis_url.replace("db=0", "db=1"), decode_responses=True)
    for _ in range(100):
        if messages := broker.lrange("flexllm", 0, -1):
            break
        time.sleep(0.05)
    assert "validate_dataset" in messages[0]
    assert row(idle_api, job.id, "status") == "validating_files"
