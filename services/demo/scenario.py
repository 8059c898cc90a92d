"""The demo's story, from the first question to the closing table."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, omit
from openai.types.fine_tuning import FineTuningJob
from rich.console import Console

from services.demo.record import Record
from services.demo.report import Display, save_picture, side_by_side, summary, summary_table
from services.demo.traffic import SEED, Traffic, watch_worker
from services.errors import OperatorError
from shared.config import Settings

DATA = Path(__file__).parent.parent.parent / "data" / "gsm8k"
BASELINE_S = 20.0  # traffic alone
ALONE_S = 20.0  # finetuning alone
TOGETHER_S = 90.0  # both; then the job ends on its own
QUESTIONS = 4
ANSWER_TOKENS = 224
JOB_TIMEOUT_S = 1200.0
COMMON = {"max_seq_len": 512, "warmup_ratio": 0.05}
SHORT = COMMON | {"max_steps": 6}
LONGEST = "lora"
JOBS: dict[str, dict[str, Any]] = {  # trained at once, in the same iterations
    LONGEST: COMMON | {"peft": {"type": "lora", "rank": 16, "alpha": 32}, "learning_rate": 1e-3},
    "ia3": SHORT | {"peft": {"type": "ia3"}},
    "bottleneck": SHORT | {"peft": {"type": "bottleneck", "size": 64}, "learning_rate": 1e-3},
}


class DemoFailed(OperatorError):
    """Something that the demo shows did not happen."""


async def create_jobs(client: AsyncOpenAI, model: str) -> dict[str, FineTuningJob]:
    """One job for each method; the longest has a validation set too."""
    files = {}
    for name in ("train", "validation"):
        with (DATA / f"{name}.jsonl").open("rb") as file:
            files[name] = (await client.files.create(file=file, purpose="fine-tune")).id
    return {
        name: await client.fine_tuning.jobs.create(
            model=model,
            training_file=files["train"],
            validation_file=files["validation"] if name == LONGEST else omit,
            suffix=suffix(name),
            seed=SEED,
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}},
            },
            extra_body={"flexllm": options},
        )
        for name, options in JOBS.items()
    }


def suffix(name: str) -> str:
    return f"gsm8k-{name}"


async def follow_jobs(
    client: AsyncOpenAI, jobs: dict[str, FineTuningJob], record: Record
) -> dict[str, FineTuningJob]:
    """Until all jobs have ended; keeps the losses that their events tell."""
    return dict(
        zip(
            jobs,
            await asyncio.gather(*(follow_job(client, n, j.id, record) for n, j in jobs.items())),
            strict=True,
        )
    )


async def follow_job(client: AsyncOpenAI, name: str, job_id: str, record: Record) -> FineTuningJob:
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while time.monotonic() < deadline:
        job = await client.fine_tuning.jobs.retrieve(job_id)
        events = await client.fine_tuning.jobs.list_events(job_id, limit=100)
        steps = [e.data for e in events.data if isinstance(e.data, dict) and e.data.get("train_loss")]
        if steps:
            record.total_steps[name] = int(steps[0]["total_steps"])
            record.losses[name] = sorted((int(d["step"]), float(d["train_loss"])) for d in steps)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        await asyncio.sleep(0.5)
    raise DemoFailed(f"job {job_id} did not end within {JOB_TIMEOUT_S:.0f} s")


async def until_training(record: Record, jobs: asyncio.Task[dict[str, FineTuningJob]]) -> None:
    """Until every job has done a step, or all ended before."""
    while len(record.losses) < len(JOBS):
        done, _ = await asyncio.wait([jobs], timeout=0.2)
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


async def answer_all(client: AsyncOpenAI, model: str, asked: list[str]) -> list[str]:
    return list(await asyncio.gather(*(answer(client, model, question) for question in asked)))


def succeeded(job: FineTuningJob) -> str:
    """The name that the job's adapter is served by."""
    if job.status != "succeeded" or job.fine_tuned_model is None:
        raise DemoFailed(f"job {job.id} {job.status}: {job.error and job.error.message}")
    return job.fine_tuned_model


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
        reply = await http.get(
            f"/v1/adapters/{suffix(LONGEST)}/versions", headers={"authorization": f"Bearer {key}"}
        )
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
            answers = {"base": await answer_all(client, model, asked)}
            display.phase = "serving alone"
            async with traffic.flowing():
                with record.span("serving alone"):
                    await asyncio.sleep(BASELINE_S)
            display.phase = "starting the jobs"
            following = asyncio.create_task(follow_jobs(client, await create_jobs(client, model), record))
            await until_training(record, following)
            display.phase = "finetuning alone"
            with record.span("finetuning alone"):
                await asyncio.wait([following], timeout=ALONE_S)
            display.phase = "serving and finetuning"
            async with traffic.flowing():
                with record.span("serving and finetuning"):
                    await asyncio.wait([following], timeout=TOGETHER_S)
            display.phase = "finishing the jobs"
            served = {name: succeeded(job) for name, job in (await following).items()}
            display.phase = "serving the adapters"
            first = await first_token_s(client, served[LONGEST])
            found = await asyncio.gather(*(answer_all(client, name, asked) for name in served.values()))
            answers |= dict(zip(served, found, strict=True))
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
    figures = summary(record, await version_metrics(settings, key), first, answers)
    console.print(side_by_side(asked, answers))
    console.print(summary_table(figures, settings.tpot_slo_ms))
    save_picture(record, out / "demo.png")
    (out / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    console.print(
        f"picture {out / 'demo.png'}, figures {out / 'demo.json'}; "
        f"served as [bold]{', '.join(served.values())}[/]"
    )
    if record.failed:
        raise DemoFailed(f"{len(record.failed)} requests failed, the first with {record.failed[0]}")


def run_demo(settings: Settings, key: str, console: Console, out: Path) -> None:
    """Raises DemoFailed where a request or the job failed. Writes `demo.png` and `demo.json` to `out`."""
    asyncio.run(scenario(settings, key, console, out))
