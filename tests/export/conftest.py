"""The Ollama server that tests talk to: the double always, and a real one where there is one."""

import json
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from export.ollama import list_models, remove, resolve_host, server_version
from tests.ollama_double import OllamaDouble


@dataclass
class ServerUnderTest:
    """An Ollama server and what a test may make there.

    Attributes:
        url: Of the server.
        version: Of the server.
        double: None where the server is a real one.
        prefix: Begins the names of this test's models, so that nobody else's are touched.
    """

    url: str
    version: str
    double: OllamaDouble | None
    prefix: str = field(default_factory=lambda: f"grit-test-{uuid.uuid4().hex[:10]}")

    def rename(self, tree: Path) -> None:
        """Gives the models of a tree names of this test."""
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
