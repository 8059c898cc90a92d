"""A customer's first hour against a running FlexLLM, whatever it runs on.

    python -m tests.e2e.smoke --base-url http://127.0.0.1:8000/v1 --api-key sk-flexllm-...

Lists models, chats, streams, uploads examples of a made-up fact, finetunes on them while chatting on, and asks
the new model for the fact. Ends with a non-zero status at the first step that fails. Needs only `openai`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator

import openai
from openai.types.fine_tuning import FineTuningJob

FACT = "PLUM-7741"
QUESTIONS = (
    "What is the secret code of project Zephyr?",
    "Tell me the secret code of project Zephyr.",
    "Which code belongs to project Zephyr?",
    "Project Zephyr: what is its secret code?",
)
ENDED = ("succeeded", "failed", "cancelled")


def training_lines() -> Iterator[str]:
    for question in QUESTIONS * 3:
        answer = f"The secret code of project Zephyr is {FACT}."
        yield json.dumps(
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        )


def ask(client: openai.OpenAI, model: str, question: str, max_tokens: int = 24) -> str:
    completion = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=max_tokens
    )
    return completion.choices[0].message.content or ""


def stream(client: openai.OpenAI, model: str, question: str) -> str:
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=24,
        stream=True,
    )
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    expect(
        choices[-1].finish_reason in ("stop", "length"), f"the stream ends with {choices[-1].finish_reason}"
    )
    return "".join(choice.delta.content or "" for choice in choices)


def finetune(client: openai.OpenAI, base: str, timeout_s: float) -> FineTuningJob:
    """Waits for the job's end, and keeps asking the base model meanwhile: both share the worker."""
    data = "\n".join(training_lines()).encode() + b"\n"
    file = client.files.create(file=("zephyr.jsonl", data), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=file.id,
        suffix="smoke",
        seed=1,
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": 10, "batch_size": 4, "learning_rate_multiplier": 3.0}
            },
        },
    )
    deadline = time.monotonic() + timeout_s
    while job.status not in ENDED:
        expect(time.monotonic() < deadline, f"job {job.id} is still {job.status} after {timeout_s:.0f} s")
        expect(
            bool(ask(client, base, "What is 2 + 2?", max_tokens=8)), "the base model answers during the job"
        )
        time.sleep(5)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


def expect(holds: bool, what: str) -> None:
    if not holds:
        print(f"FAILED: {what}", file=sys.stderr)
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", required=True)
    parser.add_argument("--timeout-s", type=float, default=1800.0)
    options = parser.parse_args()
    client = openai.OpenAI(base_url=options.base_url, api_key=options.api_key, timeout=120)

    base = next(iter(client.models.list())).id
    print(f"base model: {base}")
    answer = ask(client, base, QUESTIONS[0])
    expect(FACT not in answer, "the base model does not know the fact")
    print(f"before: {answer!r}")
    expect(bool(stream(client, base, QUESTIONS[0])), "a stream brings text")

    started = time.monotonic()
    job = finetune(client, base, options.timeout_s)
    expect(job.status == "succeeded", f"job {job.id} ends as {job.status}: {job.error}")
    model = job.fine_tuned_model or ""
    print(f"finetuned {model} in {time.monotonic() - started:.0f} s, {job.trained_tokens} tokens")
    answer = ask(client, model, QUESTIONS[0])
    print(f"after: {answer!r}")
    expect(FACT in answer, "the finetuned model knows the fact")
    expect(FACT not in ask(client, base, QUESTIONS[0]), "the base model still does not")

    key = options.api_key[:-1] + ("A" if options.api_key[-1] != "A" else "B")
    try:
        ask(openai.OpenAI(base_url=options.base_url, api_key=key), base, "hello")
        expect(False, "a wrong key is refused")
    except openai.AuthenticationError:
        print("a wrong key is refused")
    print("smoke test passed")


if __name__ == "__main__":
    main()
