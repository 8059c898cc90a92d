"""A base model on disk: Hugging Face's layout, and the digests by which adapters and caches name it.

`flexllm.json` beside the weights remembers the digests, because hashing many gigabytes at every start would
keep a service waiting. Weight files are hashed again when their size has changed, small files always.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.messages import content_digest

DESCRIPTION_FILE = "flexllm.json"
SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
CHUNK_BYTES = 1 << 20


class ModelFolderError(ValueError):
    """The folder is not a model that FlexLLM can serve; the message says why."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What identifies a base model. Equal digests mean equal logits and equal token ids."""

    path: Path
    base_digest: str  # of config.json and every weight file
    tokenizer_digest: str  # of tokenizer.json and the chat template
    source: str  # where it came from, for people


def describe_model(model_dir: Path, source: str | None = None) -> ModelFolder:
    """Checks the folder and returns its digests, hashing what `flexllm.json` does not know.

    The file is written or renewed where the folder is writable. Raises `ModelFolderError`.
    """
    check_model(model_dir)
    known = _read_known(model_dir)
    files = {name: _file_entry(model_dir / name, known) for name in _identity_files(model_dir)}
    template = hashlib.sha256((read_chat_template(model_dir) or "").encode()).hexdigest()
    tokenizer = {"tokenizer.json": files.pop("tokenizer.json")["sha256"], "chat_template": template}
    description: dict[str, Any] = {
        "base_digest": content_digest({name: entry["sha256"] for name, entry in files.items()}),
        "tokenizer_digest": content_digest(tokenizer),
        "source": source or known.get("source") or str(model_dir.resolve()),
        "files": files,
    }
    if description != known:
        _write_description(model_dir, description)
    return ModelFolder(
        path=model_dir,
        base_digest=description["base_digest"],
        tokenizer_digest=description["tokenizer_digest"],
        source=description["source"],
    )


def check_model(model_dir: Path) -> None:
    """Raises `ModelFolderError` unless a supported configuration, weights and a tokenizer are there."""
    if not model_dir.is_dir():
        raise ModelFolderError(f"no model folder at {model_dir}: run `flexllm models pull` or set the model")
    for name in ("config.json", "tokenizer.json"):
        if not (model_dir / name).is_file():
            raise ModelFolderError(f"{model_dir} has no {name}")
    model_type = read_json(model_dir / "config.json").get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise ModelFolderError(f"{model_dir}: model_type {model_type!r} is not one of {supported}")
    if not weight_files(model_dir):
        raise ModelFolderError(f"{model_dir} has no model*.safetensors")


def weight_files(model_dir: Path) -> list[str]:
    """Names of the weight files, in order; those of the index where there is one."""
    index = model_dir / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(path.name for path in model_dir.glob("model*.safetensors"))
    names = sorted(set(read_json(index)["weight_map"].values()))
    missing = [name for name in names if not (model_dir / name).is_file()]
    if missing:
        raise ModelFolderError(f"{model_dir} lacks {', '.join(missing)} of its index")
    return names


def read_chat_template(model_dir: Path) -> str | None:
    """The chat template, from `chat_template.jinja` or the tokenizer's configuration."""
    own_file = model_dir / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text()
    settings_file = model_dir / "tokenizer_config.json"
    template = read_json(settings_file).get("chat_template") if settings_file.is_file() else None
    if isinstance(template, list):  # several named ones
        template = next((each["template"] for each in template if each["name"] == "default"), None)
    return template


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `ModelFolderError` where it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelFolderError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} holds no JSON object")
    return content


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _identity_files(model_dir: Path) -> Iterable[str]:
    return ("config.json", "tokenizer.json", *weight_files(model_dir))


def _file_entry(path: Path, known: dict[str, Any]) -> dict[str, Any]:
    size = path.stat().st_size
    entry = known.get("files", {}).get(path.name)
    if entry and entry["size"] == size and path.suffix == ".safetensors":
        return {"size": size, "sha256": entry["sha256"]}
    return {"size": size, "sha256": sha256_file(path)}


def _read_known(model_dir: Path) -> dict[str, Any]:
    path = model_dir / DESCRIPTION_FILE
    return read_json(path) if path.is_file() else {}


def _write_description(model_dir: Path, description: dict[str, Any]) -> None:
    if not os.access(model_dir, os.W_OK):
        return
    with tempfile.NamedTemporaryFile("w", dir=model_dir, suffix=".tmp", delete=False) as file:
        json.dump(description, file, indent=2)
    os.chmod(file.name, 0o644)
    os.replace(file.name, model_dir / DESCRIPTION_FILE)
