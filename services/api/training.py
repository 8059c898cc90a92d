"""From a request for a finetuning job to everything that decides what the job computes."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import orjson

from services.api.adapters import unknown_model
from services.api.schemas.fine_tuning import DEFAULTS, MIN_SEQ_LEN, CreateJob, Extension
from services.api.schemas.peft import LoraOptions
from services.api.state import ApiState
from shared.db import tenant_transaction
from shared.errors import InvalidRequestError
from shared.jobs import NewJob
from shared.keys import KeyOwner
from shared.messages import TrainSpec
from shared.peft import LoraSpec, PeftSpec
from shared.registry import find_model

MAX_LEARNING_RATE = 10.0
LEARNING_RATES = {  # of AdamW, where the job names none; the fewer numbers a method trains, the larger
    "lora": 2e-4,  # as the paper trains GPT-2 and as QLoRA trains LLaMA up to 13B
    "ia3": 8e-3,  # PEFT's guide; the paper's 3e-3 is Adafactor's
    "bottleneck": 3e-4,  # LLM-Adapters on LLaMA; inside the sweep of the paper
    "prefix_tuning": 1e-2,  # PEFT's guide; three times as much overshoots at first
    "prompt_tuning": 3e-2,  # PEFT's guide; the paper's 0.3 is Adafactor's and learns less here
}


async def new_job(
    state: ApiState, owner: KeyOwner, body: CreateJob, raw: dict[str, Any], idempotency_key: str | None
) -> NewJob:
    """Raises InvalidRequestError, NotFoundError (`model_not_found`)."""
    await check_model(state, owner, body.model)
    spec = train_spec(state, body)
    hyperparameters = {
        "n_epochs": spec.n_epochs,
        "batch_size": spec.batch_size,
        "learning_rate_multiplier": multiplier(body),
    }
    return NewJob(
        base_model=state.base.id,
        training_file=body.training_file,
        validation_file=body.validation_file,
        spec=spec,
        request_hash=hashlib.sha256(orjson.dumps(raw, option=orjson.OPT_SORT_KEYS)).hexdigest(),
        hyperparameters=hyperparameters,
        suffix=body.suffix,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        metadata=body.metadata,
        extension=extension(body, spec),
        promote=bool(body.flexllm and body.flexllm.promote),
        priority=body.flexllm.priority if body.flexllm else 0,
        key_id=owner.key_id,
        idempotency_key=check_idempotency_key(idempotency_key),
    )


async def check_model(state: ApiState, owner: KeyOwner, name: str) -> None:
    if name == state.base.id:
        return
    async with tenant_transaction(state.sessions, owner.tenant_id) as session:
        known = await find_model(session, owner.tenant_id, name)
    if known is None:
        raise unknown_model(name)
    message = f"Only the base model {state.base.id!r} can be fine-tuned, not an adapter of it."
    raise InvalidRequestError(message, param="model", code="model_not_available")


def multiplier(body: CreateJob) -> float:
    asked = body.chosen.learning_rate_multiplier
    return 1.0 if asked == "auto" else asked


def train_spec(state: ApiState, body: CreateJob) -> TrainSpec:
    chosen, options = body.chosen, body.flexllm or Extension()
    peft = peft_spec(state, options)
    return TrainSpec(
        peft=peft,
        n_epochs=DEFAULTS.n_epochs if chosen.n_epochs == "auto" else chosen.n_epochs,
        batch_size=DEFAULTS.batch_size if chosen.batch_size == "auto" else chosen.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=learning_rate(body, options, peft),
        lr_schedule=options.lr_schedule,
        warmup_ratio=options.warmup_ratio,
        weight_decay=options.weight_decay,
        beta1=options.beta1,
        beta2=options.beta2,
        epsilon=options.epsilon,
        max_grad_norm=options.max_grad_norm,
        max_seq_len=max_seq_len(state, options, peft),
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        eval_every_steps=options.eval_every_steps,
        max_steps=options.max_steps,
    )


def peft_spec(state: ApiState, options: Extension) -> PeftSpec:
    peft = (options.peft or LoraOptions()).spec()
    limit = state.settings.max_lora_rank
    if isinstance(peft, LoraSpec) and peft.rank > limit:
        raise InvalidRequestError(f"the largest rank is {limit}", param="flexllm.peft.rank")
    return peft


def learning_rate(body: CreateJob, options: Extension, peft: PeftSpec) -> float:
    rate = (options.learning_rate or LEARNING_RATES[peft.type]) * multiplier(body)
    if rate > MAX_LEARNING_RATE:
        raise InvalidRequestError(
            f"a learning rate of {rate:g} is above {MAX_LEARNING_RATE:g}", param="learning_rate_multiplier"
        )
    return rate


def max_seq_len(state: ApiState, options: Extension, peft: PeftSpec) -> int:
    """Of an example; the method's virtual tokens stand in front of each."""
    num_virtual_tokens = peft.num_virtual_tokens
    longest = state.base.max_train_len - num_virtual_tokens
    if longest < MIN_SEQ_LEN:
        message = (
            f"this server trains on sequences of {state.base.max_train_len} tokens; "
            f"{num_virtual_tokens} virtual ones leave too few for an example"
        )
        raise InvalidRequestError(message, param="flexllm.peft.num_virtual_tokens")
    if options.max_seq_len is None:
        return min(DEFAULTS.max_seq_len, longest)
    if options.max_seq_len > longest:
        beside = f" beside {num_virtual_tokens} virtual ones" if num_virtual_tokens else ""
        message = f"the longest example that this server trains on has {longest} tokens{beside}"
        raise InvalidRequestError(message, param="flexllm.max_seq_len")
    return options.max_seq_len


def extension(body: CreateJob, spec: TrainSpec) -> dict[str, Any]:
    """The `flexllm` object as it comes back: nothing is left to guess."""
    decided = spec.model_dump(mode="json", exclude={"n_epochs", "batch_size", "seed"})
    options = body.flexllm or Extension()
    return decided | {"priority": options.priority, "promote": options.promote}


def check_idempotency_key(key: str | None) -> str | None:
    if key is not None and not (1 <= len(key) <= 255 and key.isascii() and key.isprintable()):
        raise InvalidRequestError("an Idempotency-Key has 1 to 255 printable ASCII characters")
    return key
