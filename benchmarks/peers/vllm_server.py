"""vLLM measured on request, run by the Python of its own environment: `vllm_server.py MODEL [ADAPTER ...]`.

A line of JSON on standard input says what to generate, one on standard output how long that took; the first
line that it prints says that the model is loaded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def load(folder: str, adapters: list[str]) -> LLM:
    """As vLLM comes, for requests of up to 512 tokens and 32 at once; the rank of adapters is 16."""
    lora: dict[str, Any] = {}
    if adapters:
        lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": 16}
    return LLM(
        folder,
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=32,
        enable_prefix_caching=False,  # no side may use what an earlier round computed
        **lora,
    )


def generate(llm: LLM, requests: list[LoRARequest], wanted: dict[str, Any]) -> dict[str, Any]:
    """Greedy; `adapters` of the wanted are indices into the adapters, or null."""
    sampling = SamplingParams(
        temperature=0, max_tokens=wanted["max_tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in wanted["prompts"]]
    adapters = wanted["adapters"] and [requests[index] for index in wanted["adapters"]]
    started = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapters)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "outputs": [list(output.outputs[0].token_ids) for output in outputs]}


def reply(to: TextIO, content: dict[str, Any]) -> None:
    to.write(json.dumps(content) + "\n")
    to.flush()


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to standard error
    folder, *adapters = sys.argv[1:]
    llm = load(folder, adapters)
    requests = [LoRARequest(f"a{index}", index + 1, path) for index, path in enumerate(adapters)]
    reply(replies, {"ready": True})
    for line in sys.stdin:
        reply(replies, generate(llm, requests, json.loads(line)))


if __name__ == "__main__":
    main()
