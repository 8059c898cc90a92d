"""One tenant never sees, uses or learns of what belongs to another; adapters are served to their owner."""

from __future__ import annotations

import hashlib
import json

import openai
import psycopg
import pytest

from services.api.model import BaseModel
from shared.messages import TrainSpec
from tests.api.conftest import TEXT, Api

MESSAGES = [{"role": "user", "content": "hi"}]
DIGEST = hashlib.sha256(b"adapter").hexdigest()
NAMES = ["ft:tiny:acme:bot:0123abcd", "acme/bot", "acme/bot@live", "acme/bot@1"]


@pytest.fixture
def adapter(idle_api: Api) -> None:
    publish_adapter(idle_api, TrainSpec())


def publish_adapter(api: Api, spec: TrainSpec) -> None:
    """A version of acme's, as a job would have published it."""
    api.key("acme")
    base = BaseModel.load(api.settings).base_digest
    url = api.settings.database_url.replace("+psycopg", "")
    with psycopg.connect(url, options="-c app.tenant=*") as db:
        tenant = db.execute("SELECT id FROM tenant WHERE slug = 'acme'").fetchone()[0]
        db.execute("INSERT INTO base_model (digest, name, tokenizer_digest) VALUES (%s, 'tiny', 't')", [base])
        db.execute("INSERT INTO adapter (id, tenant_id, name) VALUES ('adpt_1', %s, 'bot')", [tenant])
        db.execute(
            "INSERT INTO adapter_version (id, tenant_id, adapter_id, version, state, model_name, digest, files,"
            " size_bytes, base_model, base_digest, tokenizer_digest, hyperparameters, metrics)"
            " VALUES ('ver_1', %s, 'adpt_1', 1, 'READY', %s, %s, %s, 1, 'tiny', %s, 't', %s, '{}')",
            [tenant, NAMES[0], DIGEST, json.dumps({}), base, spec.model_dump_json()],
        )
        db.execute(
            "INSERT INTO adapter_alias (adapter_id, name, tenant_id, version_id)"
            " VALUES ('adpt_1', 'live', %s, 'ver_1')",
            [tenant],
        )


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_served_under_each_of_its_names(api: Api, adapter: None, name: str) -> None:
    raw = api.openai().chat.completions.with_raw_response.create(model=name, messages=MESSAGES)
    answer = raw.parse()
    assert answer.choices[0].message.content == TEXT
    assert answer.model == name
    assert raw.headers["x-adapter-version"] == DIGEST
    assert answer.system_fingerprint.endswith(DIGEST[:12])
    assert api.requests[0].adapter.digest == DIGEST
    assert api.openai().models.retrieve(name).id == name


@pytest.mark.parametrize("name", NAMES)
def test_to_another_tenant_an_adapter_does_not_exist(api: Api, adapter: None, name: str) -> None:
    client = api.openai("other")
    with pytest.raises(openai.NotFoundError) as foreign:
        client.chat.completions.create(model=name, messages=MESSAGES)
    assert foreign.value.code == "model_not_found"
    for act in (client.models.retrieve, client.models.delete):
        with pytest.raises(openai.NotFoundError):
            act(name)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert api.requests == []


def test_models_are_listed_retrieved_and_deleted(api: Api, adapter: None) -> None:
    client = api.openai()
    assert [model.id for model in client.models.list()] == ["tiny", NAMES[0], "acme/bot"]
    assert client.models.retrieve("tiny").owned_by == "system"
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tiny")
    deleted = client.models.delete(NAMES[0])
    assert (deleted.id, deleted.deleted) == (NAMES[0], True)
    for name in NAMES:
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=name, messages=MESSAGES)


def test_what_belongs_to_another_is_as_if_it_were_not(idle_api: Api) -> None:
    mine = idle_api.openai("acme")
    file_id = mine.files.create(file=("a.jsonl", b"{}"), purpose="fine-tune").id
    job_id = mine.fine_tuning.jobs.create(model="tiny", training_file=file_id).id
    with idle_api.http("other") as http:
        for method, path in (
            ("GET", "/v1/files/{file}"),
            ("DELETE", "/v1/files/{file}"),
            ("GET", "/v1/files/{file}/content"),
            ("GET", "/v1/fine_tuning/jobs/{job}"),
            ("POST", "/v1/fine_tuning/jobs/{job}/cancel"),
            ("POST", "/v1/fine_tuning/jobs/{job}/pause"),
            ("POST", "/v1/fine_tuning/jobs/{job}/resume"),
            ("GET", "/v1/fine_tuning/jobs/{job}/events"),
            ("GET", "/v1/fine_tuning/jobs/{job}/checkpoints"),
        ):
            foreign = http.request(method, path.format(file=file_id, job=job_id))
            missing = http.request(method, path.format(file="file-none", job="ftjob-none"))
            assert foreign.status_code == missing.status_code == 404, path
            assert foreign.text.replace(file_id, "file-none").replace(job_id, "ftjob-none") == missing.text
        assert http.get("/v1/files").json()["data"] == []
        assert http.get("/v1/fine_tuning/jobs").json()["data"] == []
        response = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id})
        assert (response.status_code, response.json()["error"]["param"]) == (404, "training_file")
    assert mine.fine_tuning.jobs.retrieve(job_id).status == "validating_files"


def test_tenants_do_not_share_a_prefix_cache(api: Api) -> None:
    for org in ("acme", "acme", "other"):
        api.openai(org).chat.completions.create(model="tiny", messages=MESSAGES)
    salts = [request.cache_salt for request in api.requests]
    assert salts[0] == salts[1] != salts[2]


def test_each_answer_is_billed_once(api: Api) -> None:
    list(api.openai().chat.completions.create(model="tiny", messages=MESSAGES, n=2, stream=True))
    api.openai("other").completions.create(model="tiny", prompt="x", max_tokens=3)
    url = api.settings.database_url.replace("+psycopg", "")
    with psycopg.connect(url, options="-c app.tenant=*") as db:
        rows = db.execute(
            "SELECT t.slug, u.prompt_tokens, u.completion_tokens, u.model FROM usage_record u"
            " JOIN tenant t ON t.id = u.tenant_id ORDER BY t.slug"
        ).fetchall()
    num_prompt, num_text = len(api.tokenizer.encode_chat(MESSAGES)), len(api.tokenizer.encode(TEXT))
    assert rows == [("acme", num_prompt, 2 * num_text, "tiny"), ("other", 1, 3, "tiny")]
