"""Registering with a server: what arrives there, what is skipped, and what is said when it fails."""

import hashlib

import pytest

from export import ExportError, MergedOnlyError
from export import register as registration
from export.engines.engine import EngineError
from export.engines.ollama_engine import (
    list_models,
    parse_parameters,
    remove,
    render_asked,
    resolve_host,
    server_version,
)
from export.go import go_template
from export.modelfile import Serving
from export.served import Served
from tests.ollama_double import OllamaDouble

TEMPLATE = '### Say "x":\n{prompt}\n\n### Response:\n'
GO = go_template(TEMPLATE)


@pytest.fixture
def double():
    with OllamaDouble(reply=lambda rendered: "126") as server:
        yield server


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(range(256)) * 40)
    return path


def serving(**changes) -> Serving:
    return Serving(**{"template": TEMPLATE, "num_ctx": 512, "stop": ["###", '\n"é'], **changes})


def register(url, name, gguf, serving, adapter=None, *, records):
    return registration.register(url, Served(name, name, 0, gguf.parent, gguf, adapter, serving), records)


def sent(double, path):
    return [body for _, p, body in double.requests if p.startswith(path)]


HOSTS = """1.2.3.4 :5678 1.2.3.4:5678 http://1.2.3.4 https://example.com https://example.com:9/p/ x/y example.com/ [::1]
[::1]:5678 http://[::1] localhost 0.0.0.0:11434"""


@pytest.mark.parametrize("host", ["", *HOSTS.split()])
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
    with pytest.raises(EngineError, match="expected an Ollama server"):
        server_version(double.url + "/elsewhere")
    double.die()
    assert server_version(double.url) is None


def test_loopback_never_goes_through_a_proxy(double, monkeypatch, gguf, tmp_path):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert register(double.url, "m", gguf, serving(), records=tmp_path).created


def test_what_the_server_holds_is_what_was_given(double, gguf, tmp_path):
    made = register(double.url, "pure_grit_model", gguf, serving(license="MIT"), records=tmp_path)
    sha = hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert made.created
    assert double.blobs[f"sha256:{sha}"].read_bytes() == gguf.read_bytes()
    model = double.models["pure_grit_model:latest"]
    assert model.template == GO
    assert ("license", "MIT") in sent(double, "/api/create")[0].items()
    assert model.digest == made.digest
    assert model.parameters == serving().parameters and model.parameters["top_k"] == 1
    assert render_asked(double.url, "pure_grit_model", "Hi") == TEMPLATE.replace("{prompt}", "Hi")


def test_the_second_time_nothing_is_sent(double, gguf, tmp_path):
    first = register(double.url, "m", gguf, serving(), records=tmp_path)
    double.requests.clear()
    again = register(double.url, "m", gguf, serving(), records=tmp_path)
    assert not sent(double, "/api/blobs") and not sent(double, "/api/create")
    assert again == type(first)(**{**vars(first), "created": False})
    register(double.url, "b", gguf, serving(), records=tmp_path)  # another name, the same weights
    assert [m for m, p, _ in double.requests if p.startswith("/api/blobs")] == ["HEAD"]


@pytest.mark.parametrize(
    "change", ["weights", "template", "parameters", "replaced", "removed", "record lost", "garbled"]
)
def test_any_change_makes_the_model_anew(double, gguf, tmp_path, change):
    records = tmp_path / "records"
    first = register(double.url, "m", gguf, serving(), records=records)
    after = serving()
    if change == "weights":
        gguf.write_bytes(b"GGUF other")
    elif change == "template":
        after = serving(template="{prompt}!")
    elif change == "parameters":
        after = serving(num_ctx=256)
    elif change == "replaced":
        double.models["m:latest"].digest = "0" * 64  # someone made another model of that name
    elif change == "removed":
        assert remove(double.url, "m")
    elif change == "record lost":
        next(records.iterdir()).unlink()
    else:
        next(records.iterdir()).write_bytes(b"\xff")
    made = register(double.url, "m", gguf, after, records=records)
    assert made.created
    assert (made.digest == first.digest) == (change in {"replaced", "removed", "record lost", "garbled"})
    assert not register(double.url, "m", gguf, after, records=records).created


def test_adapter_goes_along_and_new_releases_refuse_it(double, gguf, tmp_path):
    adapter = tmp_path / "adapter.gguf"
    adapter.write_bytes(b"GGUF adapter")
    register(double.url, "m", gguf, serving(), adapter, records=tmp_path)
    assert double.models["m:latest"].adapter.read_bytes() == b"GGUF adapter"
    assert register(double.url, "m", gguf, serving(), None, records=tmp_path).created
    double.version = "0.34.1"
    with pytest.raises(MergedOnlyError, match=r"from 0\.34\.1 on .*register the merged GGUF"):
        register(double.url, "m", gguf, serving(), adapter, records=tmp_path)


def test_creation_must_end_in_success_with_the_settings_that_were_given(double, gguf, tmp_path):
    double.misbehave = "no_success"
    with pytest.raises(EngineError, match="end in 'success', it ended in 'creating new layer"):
        register(double.url, "m", gguf, serving(), records=tmp_path)
    double.misbehave = "break_create"
    with pytest.raises(EngineError, match="ollama serve"):
        register(double.url, "m", gguf, serving(), records=tmp_path)
    assert list_models(double.url) == {}
    double.misbehave = "forget_settings"
    with pytest.raises(EngineError, match=r"num_ctx: expected \[512\], got None"):
        register(double.url, "m", gguf, serving(), records=tmp_path)
    assert list(tmp_path.iterdir()) == [gguf], "no record"


def test_no_server_and_no_file(double, gguf, tmp_path):
    with pytest.raises(ExportError, match="run the export stage first"):
        register(double.url, "m", tmp_path / "none.gguf", serving(), records=tmp_path)
    with pytest.raises(ExportError, match="at least one word"):
        register(double.url, "m", gguf, serving(stop=[]), records=tmp_path)
    double.die()
    with pytest.raises(EngineError, match=double.url):
        register(double.url, "m", gguf, serving(), records=tmp_path)
    with pytest.raises(EngineError, match=double.url):
        list_models(double.url)


def test_list_and_remove(double, gguf, tmp_path):
    made = register(double.url, "m", gguf, serving(), records=tmp_path)
    assert list_models(double.url) == {"m:latest": made.digest}
    assert not remove(double.url, "m:other") and remove(double.url, "m") and not remove(double.url, "m")
    assert list_models(double.url) == {}


def test_parameters_text_parses_as_go_prints_it():
    text = 'stop                           "<s> \\"a\\"\\n"\nstop                           "###"\n'
    got = parse_parameters(text + "temperature   0\nnum_ctx       1.048576e+06\nodd           a b\n")
    assert got == {"stop": ['<s> "a"\n', "###"], "temperature": [0.0], "num_ctx": [1048576], "odd": ["a b"]}
