"""Registering with a server: what arrives there, what is skipped, and what is said when it fails."""

import hashlib
import json
from pathlib import Path

import pytest

from export.errors import ExportError
from export.modelfile import ModelfileSpec
from export.ollama import (
    OllamaError,
    OllamaUnavailable,
    connect,
    list_models,
    parse_parameters,
    register,
    remove,
    render_prompt,
    resolve_host,
    server_version,
)
from tests.ollama_double import OllamaDouble

TEMPLATE = '### Say "x":\n{{ .Prompt }}\n\n### Response:\n'


@pytest.fixture
def double():
    with OllamaDouble(reply=lambda rendered: "126") as server:
        yield server


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(range(256)) * 40)
    return path


def spec(**changes: object) -> ModelfileSpec:
    fields: dict = {"from_path": "./model.gguf", "template": TEMPLATE, "num_ctx": 512, "temperature": 0.0}
    return ModelfileSpec(**{**fields, "stop": ["###", '\n"é'], "num_predict": 8, **changes})


def sent(double: OllamaDouble, path: str) -> list:
    return [body for _, p, body in double.requests if p.startswith(path)]


@pytest.mark.parametrize(
    "host",
    [
        "",
        "1.2.3.4",
        ":5678",
        "1.2.3.4:5678",
        "http://1.2.3.4",
        "https://example.com",
        "https://example.com:9/p/",
        "x/y",
        *("example.com/", "[::1]", "[::1]:5678", "http://[::1]", "localhost", "0.0.0.0:11434"),
    ],
)
def test_hosts_resolve_as_in_the_client(host, monkeypatch):
    theirs = pytest.importorskip("ollama._client")._parse_host
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    assert resolve_host(host) == theirs(host)
    monkeypatch.setenv("OLLAMA_HOST", host)
    assert resolve_host() == theirs(host)
    monkeypatch.delenv("OLLAMA_HOST")
    assert resolve_host() == "http://127.0.0.1:11434"


def test_version_of_a_server_of_none_and_of_something_else(double):
    assert server_version(double.url) == "0.32.0"
    assert server_version(double.url.removeprefix("http://")) == "0.32.0"
    with pytest.raises(OllamaError, match="expected an Ollama server"):
        server_version(double.url + "/elsewhere")
    double.die()
    assert server_version(double.url) is None


def test_loopback_never_goes_through_a_proxy(double, monkeypatch, gguf, tmp_path):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert server_version(double.url) == "0.32.0"
    assert register(double.url, "m", gguf, spec(), records=tmp_path).created


def test_what_the_server_holds_is_what_was_given(double, gguf, tmp_path):
    lines: list[str] = []
    made = register(double.url, "pure_grit_model", gguf, spec(license="MIT"), None, lines.append, records=tmp_path)
    sha = hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert made.created and made.gguf_sha256 == sha and made.server_version == "0.32.0"
    assert made.stored_sha256 not in (None, sha)  # the server rewrites the file; both hashes are kept
    assert double.blobs[f"sha256:{sha}"].read_bytes() == gguf.read_bytes()
    model = double.models["pure_grit_model:latest"]
    assert (model.template, model.license, model.digest, model.stored) == (
        TEMPLATE,
        "MIT",
        made.digest,
        made.stored_sha256,
    )
    assert model.parameters == {
        "num_ctx": 512,
        "temperature": 0.0,
        "num_predict": 8,
        "repeat_penalty": 1.0,
        "stop": ["###", '\n"é'],
    }
    assert lines[-1] == "pure_grit_model: success" and any("uploading 0.0 MB" in line for line in lines)
    assert render_prompt(double.url, "pure_grit_model", "Hi") == TEMPLATE.replace("{{ .Prompt }}", "Hi")


def test_the_second_time_nothing_is_sent(double, gguf, tmp_path):
    first = register(double.url, "m", gguf, spec(), records=tmp_path)
    double.requests.clear()
    again = register(double.url, "m", gguf, spec(), records=tmp_path)
    assert not sent(double, "/api/blobs") and not sent(double, "/api/create")
    assert again == type(first)(**{**vars(first), "created": False})


@pytest.mark.parametrize(
    "change", ["weights", "template", "parameters", "replaced", "removed", "record lost", "garbled"]
)
def test_any_change_makes_the_model_anew(double, gguf, tmp_path, change):
    records = tmp_path / "records"
    first = register(double.url, "m", gguf, spec(), records=records)
    after = spec()
    if change == "weights":
        gguf.write_bytes(b"GGUF other")
    elif change == "template":
        after = spec(template="{{ .Prompt }}!")
    elif change == "parameters":
        after = spec(num_ctx=256)
    elif change == "replaced":  # someone made another model of that name, with our license text and template
        with connect(double.url) as client:
            other = tmp_path / "other.gguf"
            other.write_bytes(b"GGUF of someone else")
            digest = client.create_blob(other)
            client.create("m", files={"x.gguf": digest}, template=TEMPLATE, parameters=spec().parameters)
    elif change == "removed":
        assert remove(double.url, "m")
    elif change == "record lost":
        next(records.glob("*.json")).unlink()
    else:
        next(records.glob("*.json")).write_text("[")
    made = register(double.url, "m", gguf, after, records=records)
    assert made.created
    assert (made.digest == first.digest) == (change in {"replaced", "removed", "record lost", "garbled"})
    assert not register(double.url, "m", gguf, after, records=records).created


def test_a_blob_that_is_there_is_not_sent_again(double, gguf, tmp_path):
    register(double.url, "a", gguf, spec(), records=tmp_path)
    double.requests.clear()
    register(double.url, "b", gguf, spec(), records=tmp_path)
    assert [m for m, p, _ in double.requests if p.startswith("/api/blobs")] == ["HEAD"]


def test_adapter_goes_along_and_new_releases_refuse_it(double, gguf, tmp_path):
    adapter = tmp_path / "adapter.gguf"
    adapter.write_bytes(b"GGUF adapter")
    made = register(double.url, "m", gguf, spec(), adapter, records=tmp_path)
    assert made.adapter_sha256 == hashlib.sha256(b"GGUF adapter").hexdigest()
    model = double.models["m:latest"]
    assert model.adapter is not None and model.adapter.read_bytes() == b"GGUF adapter"
    assert register(double.url, "m", gguf, spec(), None, records=tmp_path).created
    double.version = "0.34.1"
    with pytest.raises(OllamaError, match="register the merged GGUF"):
        register(double.url, "m", gguf, spec(), adapter, records=tmp_path)


def test_creation_must_end_in_success(double, gguf, tmp_path):
    double.misbehave = "no_success"
    with pytest.raises(OllamaError, match="end in 'success', it ended in 'creating new layer"):
        register(double.url, "m", gguf, spec(), records=tmp_path)
    double.misbehave = "break_create"
    with pytest.raises(OllamaUnavailable, match="ollama serve"):
        register(double.url, "m", gguf, spec(), records=tmp_path)
    assert list_models(double.url) == {} and not list(tmp_path.glob("*.json"))


def test_settings_are_read_back(double, gguf, tmp_path):
    double.misbehave = "forget_settings"
    with pytest.raises(OllamaError, match=r"num_ctx: expected \[512\], got None"):
        register(double.url, "m", gguf, spec(), records=tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_no_server_and_no_file(double, gguf, tmp_path):
    with pytest.raises(ExportError, match="run the export stage first"):
        register(double.url, "m", tmp_path / "none.gguf", spec(), records=tmp_path)
    double.die()
    with pytest.raises(OllamaUnavailable, match=double.url):
        register(double.url, "m", gguf, spec(), records=tmp_path)
    with pytest.raises(OllamaUnavailable, match=double.url):
        list_models(double.url)


def test_list_and_remove(double, gguf, tmp_path):
    made = register(double.url, "m", gguf, spec(), records=tmp_path)
    assert list_models(double.url) == {"m:latest": made.digest}
    assert not remove(double.url, "m:other") and remove(double.url, "m") and not remove(double.url, "m")
    assert list_models(double.url) == {}


def test_parameters_text_parses_as_go_prints_it():
    text = 'stop                           "<s> \\"a\\"\\n"\nstop                           "###"\n'
    got = parse_parameters(text + "temperature   0\nnum_ctx       1.048576e+06\nodd           a b\n")
    assert got == {"stop": ['<s> "a"\n', "###"], "temperature": [0.0], "num_ctx": [1048576], "odd": ["a b"]}


# --- the double itself answers as the facts say ------------------------------------------------------------


def test_double_refuses_as_the_server_does(double, gguf):
    from ollama import ResponseError

    with connect(double.url) as client:
        digest = client.create_blob(gguf)

        def refused(call, status, said):
            with pytest.raises(ResponseError, match=said) as caught:
                call()
            assert caught.value.status_code == status

        wrong = "/api/blobs/sha256:" + "0" * 64
        refused(lambda: client._request_raw("POST", wrong, content=b"x"), 400, "digest mismatch")
        refused(lambda: client.create("m", files={"a.gguf": "sha256:" + "0" * 64}), 500, "no such file")
        refused(lambda: client.create("m", files={"/a.gguf": digest}), 400, "must be relative")
        refused(lambda: client.create("m"), 400, "neither 'from' or 'files'")
        refused(lambda: client.show("none"), 404, "not found")
        client.create("m", files={"a.gguf": digest}, parameters={"num_ctx": "many"})  # not checked here …
        refused(lambda: client.generate("m", "x"), 500, "num_ctx")  # … but here
        client.create("m", files={"a.gguf": digest})
        refused(lambda: client.generate("m", "x", options={"temperature": "hot"}), 500, "temperature")
        assert client.generate("m", "x", options={"no_such_option": 1}).response == "126"


def test_double_generates_and_leaves_zeros_out(double, gguf):
    double.reply = lambda rendered: "12 END 34" if rendered == "<x>" else ""
    with connect(double.url) as client:
        digest = client.create_blob(gguf)
        client.create("m", files={"a.gguf": digest}, template="<{{ .Prompt }}>")
        first = client.generate("m", "x", options={"stop": [" END"]})
        assert (first.response, first.done_reason, first.prompt_eval_count) == ("12", "stop", 4)
        assert first.load_duration > client.generate("m", "x").load_duration > 0
        cut = client.generate("m", "x", options={"num_predict": 3})
        assert (cut.response, cut.done_reason, cut.eval_count) == ("12 ", "length", 3)
        parts = list(client.generate("m", "x", stream=True))
        assert "".join(p.response for p in parts) == "12 END 34" and parts[-1].done and not parts[0].done
        assert client.generate("m", "<x>", raw=True).response == "12 END 34"
        empty = json.loads(
            client._request_raw("POST", "/api/generate", json={"model": "m", "prompt": "?", "stream": False}).text
        )
        assert empty["response"] == "" and "eval_count" not in empty and "eval_duration" not in empty
        assert client.ps().models[0].model == "m:latest"


def test_nothing_of_the_double_is_left_behind(gguf):
    with OllamaDouble(reply=str) as double:
        with connect(double.url) as client:
            client.create_blob(gguf)
        folder = next(iter(double.blobs.values())).parent
        assert Path(folder).exists()
    assert not Path(folder).exists()
