"""The demo's story, from the first question to the closing table."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from openai.types.fine_tuning import FineTuningJob
from rich.console import Console

from services.demo.record import Record
from services.demo.report import ADAPTER, Display, save_picture, side_by_side, summary, summary_table
from services.demo.traffic import SEED, Traffic, watch_worker
from services.errors import OperatorError
from shared.config import Settings

DATA = Path(__file__).parent.parent.parent / "data" / "gsm8k"
BASELINE_S = 20.0  # traffic alone
ALONE_S = 20.0  # finetuning alone
TOGETHER_S = 120.0  # both; then the job ends on its own
QUESTIONS = 4
ANSWER_TOKENS = 224
JOB_TIMEOUT_S = 1200.0
TRAINING = {
    "peft": {"rank": 16, "alpha": 32},
    "max_seq_len": 512,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.05,
}


class DemoFailed(OperatorError):
    """Something that the demo shows did not happen."""


async def create_job(client: AsyncOpenAI, model: str) -> FineTuningJob:
    files = {}
    for name in ("train", "validation"):
        with (DATA / f"{name}.jsonl").open("rb") as file:
            files[name] = await client.files.create(file=file, purpose="fine-tune")
    return await client.fine_tuning.jobs.create(
        model=model,
        training_file=files["train"].id,
        validation_file=files["validation"].id,
        suffix=ADAPTER,
        seed=SEED,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}}},
        extra_body={"flexllm": TRAINING},
    )


async def follow_job(client: AsyncOpenAI, job_id: str, record: Record) -> FineTuningJob:
    """Until the job ends; keeps the losses that its events tell."""
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while time.monotonic() < deadline:
        job = await client.fine_tuning.jobs.retrieve(job_id)
        events = await client.fine_tuning.jobs.list_events(job_id, limit=100)
        steps = [e.data for e in events.data if isinstance(e.data, dict) and e.data.get("train_loss")]
        if steps:
            record.loss = sorted((int(d["step"]), float(d["train_loss"])) for d in steps)
            record.total_steps = int(steps[0]["total_steps"])
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        await asyncio.sleep(0.25)
    raise DemoFailed(f"job {job_id} did not end within {JOB_TIMEOUT_S:.0f} s")


async def until_training(record: Record, job: asyncio.Task[FineTuningJob]) -> None:
    """Until the first steps are done, or the job ended before."""
    while len(record.loss) < 2:
        done, _ = await asyncio.wait([job], timeout=0.2)
        if done:
            return


async def answer(client: AsyncOpenAI, model: str, question: str) -> str:
    reply = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
    )
    return reply.choices[0].message.content or ""


async def first_token_s(client: AsyncOpenAI, model: str) -> float:
    """Unix time at which the adapter's first token arrives."""
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "2 + 2 = ?"}], max_tokens=8, stream=True
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            return time.time()
    raise DemoFailed("the adapter answered without a token")


async def version_metrics(settings: Settings, key: str) -> dict[str, Any]:
    """What the registry says of the newest version."""
    async with httpx.AsyncClient(base_url=settings.adapter_store_url, trust_env=False) as http:
        reply = await http.get(f"/v1/adapters/{ADAPTER}/versions", headers={"authorization": f"Bearer {key}"})
        reply.raise_for_status()
    newest = max(reply.json()["data"], key=lambda version: version["version"])
    metrics: dict[str, Any] = newest["metrics"]
    return metrics


def questions() -> list[str]:
    lines = (DATA / "validation.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"][0]["content"] for line in lines[:QUESTIONS]]


async def scenario(settings: Settings, key: str, console: Console, out: Path) -> None:
    model = settings.model_id
    record = Record()
    url = f"http://127.0.0.1:{settings.api_port}/v1"
    http = DefaultAsyncHttpxClient(trust_env=False)
    async with AsyncOpenAI(api_key=key, base_url=url, http_client=http) as client:
        traffic = Traffic(client, model, record)
        display = Display(console, record, traffic)
        beside = [asyncio.create_task(work) for work in (watch_worker(settings, record), display.run())]
        try:
            asked = questions()
            base = [await answer(client, model, question) for question in asked]
            display.phase = "serving alone"
            async with traffic.flowing():
                with record.span("serving alone"):
                    await asyncio.sleep(BASELINE_S)
            display.phase = "starting the job"
            job = await create_job(client, model)
            following = asyncio.create_task(follow_job(client, job.id, record))
            await until_training(record, following)
            display.phase = "finetuning alone"
            with record.span("finetuning alone"):
                await asyncio.wait([following], timeout=ALONE_S)
            display.phase = "serving and finetuning"
            async with traffic.flowing():
                with record.span("serving and finetuning"):
                    await asyncio.wait([following], timeout=TOGETHER_S)
            display.phase = "finishing the job"
            job = await following
            if job.status != "succeeded" or job.fine_tuned_model is None:
                raise DemoFailed(f"job {job.id} {job.status}: {job.error and job.error.message}")
            display.phase = "serving the adapter"
            first = await first_token_s(client, job.fine_tuned_model)
            adapted = [await answer(client, job.fine_tuned_model, question) for question in asked]
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
    found = summary(record, await version_metrics(settings, key), first, base, adapted)
    console.print(side_by_side(asked, base, adapted))
    console.print(summary_table(found, settings.tpot_slo_ms))
    save_picture(record, out / "demo.png")
    (out / "demo.json").write_text(json.dumps(found, indent=2) + "\n")
    console.print(
        f"picture {out / 'demo.png'}, figures {out / 'demo.json'}; served as [bold]{job.fine_tuned_model}[/]"
    )
    if record.failed:
        raise DemoFailed(f"{len(record.failed)} requests failed, the first with {record.failed[0]}")


def run_demo(settings: Settings, key: str, console: Console, out: Path) -> None:
    """Raises DemoFailed where a request or the job failed. Writes `demo.png` and `demo.json` to `out`."""
    asyncio.run(scenario(settings, key, console, out))
