"""The engines that verification tests ask: the double always, and a real Ollama server where there is one."""

import json
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from export.engines.ollama_engine import list_models, remove, resolve_host, server_version
from tests.ollama_double import OllamaDouble


@dataclass
class ServerUnderTest:
    url: str
    version: str
    double: OllamaDouble | None  # None where the server is a real one
    prefix: str = field(
        default_factory=lambda: f"grit-test-{uuid.uuid4().hex[:10]}"
    )  # so that nobody else's models are touched

    def rename(self, tree: Path) -> None:
        for place in tree.glob("*/*/serving.json"):
            facts = json.loads(place.read_text())
            place.write_text(json.dumps({**facts, "model_name": f"{self.prefix}-{place.parts[-3]}"}))


@pytest.fixture(params=["double", pytest.param("real", marks=pytest.mark.ollama)])
def server(request, own_records):
    """The double, and the real server at OLLAMA_HOST where that is set and answers; nothing stays behind on it."""
    if request.param == "double":
        with OllamaDouble() as double:
            yield ServerUnderTest(double.url, double.version, double)
        return
    if not os.environ.get("OLLAMA_HOST"):
        pytest.skip("OLLAMA_HOST is not set: no real server to test against")
    url = resolve_host()
    version = server_version(url)
    if version is None:
        pytest.skip(f"no Ollama server answers at OLLAMA_HOST ({url})")
    before = set(list_models(url))
    made = ServerUnderTest(url, version, None)
    yield made
    left = {name for name in list_models(url) if name.startswith(made.prefix)}
    for name in left:
        remove(url, name)
    verifying = {name for name in set(list_models(url)) - before if name.startswith("grit-verify-")}
    assert not verifying, f"verification left {verifying} behind"


@pytest.fixture(params=["llama_cpp", "ollama"])
def kind(request):
    return request.param
