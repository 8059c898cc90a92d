"""Finetuning jobs that are not made."""

from __future__ import annotations

import pytest

from tests.api.conftest import Api


@pytest.fixture
def idle_api(shared_api: Api) -> Api:
    return shared_api


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"epochs": 1}}, "hyperparameters.epochs"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"suffix": "!!!"}, "suffix"),
        ({"seed": 2**31}, "seed"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"training_file": "file-none"}, "training_file"),
        ({"validation_file": "file-none"}, "validation_file"),
        ({"flexllm": {"learningrate": 1}}, "flexllm.learningrate"),
        ({"flexllm": {"peft": {"rank": 129}}}, "flexllm.peft.rank"),
        ({"flexllm": {"peft": {"type": "dora"}}}, "flexllm.peft.type"),
        ({"flexllm": {"peft": {"target_modules": "(a+)+$"}}}, "flexllm.peft.target_modules"),
        ({"flexllm": {"peft": {"target_modules": ["wte"]}}}, "flexllm.peft.target_modules"),
        ({"flexllm": {"max_seq_len": 4096}}, "flexllm.max_seq_len"),
        ({"flexllm": {"learning_rate": 1e9}}, "flexllm.learning_rate"),
        ({"status": "succeeded"}, "status"),
        ({"model": "other"}, "model"),
    ],
)
def test_what_is_wrong_is_named(idle_api: Api, file_id: str, change: dict[str, object], param: str) -> None:
    body = {"model": "tiny", "training_file": file_id} | change
    with idle_api.http() as http:
        response = http.post("/v1/fine_tuning/jobs", json=body)
    assert response.status_code in (400, 404), response.text
    assert response.json()["error"]["param"].startswith(param), response.text
    assert list(idle_api.openai().fine_tuning.jobs.list()) == []
