"""The commands that look after keys, schema and models."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from services.cli import app
from services.stack import ensure_dev_key, in_transaction
from services.state import State
from shared.config import Settings
from shared.keys import verify_key
from tests.builders import make_tiny_model


def flexllm(settings: Settings, *args: str) -> Result:
    """Runs a command against the test's database, as an operator of a production does."""
    pepper = settings.key_pepper.get_secret_value()
    environment = {"FLEXLLM_DATABASE_URL": settings.database_url, "FLEXLLM_KEY_PEPPER": pepper}
    return CliRunner().invoke(app, args, env=environment, catch_exceptions=False)


def is_valid(settings: Settings, key: str) -> bool:
    owner = in_transaction(settings, lambda session: verify_key(session, settings.key_pepper, key))
    return owner is not None


def test_a_created_key_opens_the_api_until_it_is_revoked(settings: Settings) -> None:
    key = flexllm(settings, "keys", "create", "--tenant", "acme", "--name", "ci").stdout.strip()
    assert is_valid(settings, key)

    header, line = flexllm(settings, "keys", "list").stdout.splitlines()
    assert header.split()[:3] == ["id", "tenant", "name"]
    key_id, tenant, name, prefix, scopes, _, state = line.split()
    assert (tenant, name, scopes, state) == ("acme", "ci", "infer,train", "valid")
    assert prefix in key

    flexllm(settings, "keys", "revoke", key_id, "--tenant", "acme")
    assert not is_valid(settings, key)
    assert flexllm(settings, "keys", "list").stdout.split()[-1] == "revoked"


def test_the_list_of_keys_never_shows_a_key(settings: Settings) -> None:
    key = flexllm(settings, "keys", "create", "--tenant", "acme").stdout.strip()
    assert key.rsplit("-", 1)[-1] not in flexllm(settings, "keys", "list").stdout


def test_an_unknown_scope_is_refused_with_the_choices(settings: Settings) -> None:
    with pytest.raises(Exception, match="no scope 'root': choose of infer, train, admin"):
        flexllm(settings, "keys", "create", "--scope", "root")


def test_the_development_key_is_kept_while_it_is_valid(settings: Settings, tmp_path: Path) -> None:
    state = State(tmp_path)
    key = ensure_dev_key(settings, state)
    assert ensure_dev_key(settings, state) == key
    assert state.key_path.stat().st_mode & 0o777 == 0o600
    state.key_path.write_text("sk-flexllm-of-another-database\n")
    assert is_valid(settings, ensure_dev_key(settings, state))


def test_keys_without_a_production_are_made_on_the_state_itself() -> None:
    with tempfile.TemporaryDirectory(prefix="flexllm-test-") as state:
        command = [sys.executable, "-m", "services.cli", "keys", "create", "--state-dir", state]
        made = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        command[4] = "list"
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert made.split("-")[2] in listed


def test_an_operators_mistake_is_one_line_without_a_traceback() -> None:
    command = [sys.executable, "-m", "services.cli", "models", "pull", "no-such-model"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("error: 'no-such-model' is no folder")
    assert len(outcome.stderr.splitlines()) == 1


def test_pulled_models_are_listed_with_their_origin(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "tiny")
    state = str(tmp_path / "state")
    CliRunner().invoke(app, ["models", "pull", str(source), "--state-dir", state], catch_exceptions=False)
    listed = CliRunner().invoke(app, ["models", "list", "--state-dir", state], catch_exceptions=False).stdout
    assert listed.startswith("tiny ")
    assert str(source) in listed
