"""`python -m export.ollama`: create, list, verify, remove, in both modes, against the double with real GGUF files."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from export.diagnosis import first_token
from export.errors import ExportError
from export.ollama_cli import app
from export.serving import REFERENCE, find_served
from export.verify import read_references
from tests.ollama_double import OllamaDouble

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_records")]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def creations(server):
    return [body["model"] for _, path, body in server.requests if path == "/api/create"]


def uploads(server):
    return [path for method, path, _ in server.requests if method == "POST" and path.startswith("/api/blobs")]


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_created_listed_verified_and_removed(tree, mode, tmp_path):
    with OllamaDouble() as server:
        where = ["--gguf", tree, "--host", server.url]
        made = run("create", *where, "--mode", mode)
        assert made.exit_code == 0, made.output
        assert creations(server) == ["base_model", "pure_grit_model"]
        facts = json.loads((tmp_path / f"outputs/ollama/pure_grit_model-{mode}.json").read_text())
        assert facts["mode"] == mode and facts["server_version"] == "0.32.0"
        assert facts["stored_sha256"] not in (None, facts["gguf_sha256"]), "creating rewrites the file"
        assert (facts["adapter_sha256"] is not None) == (mode == "adapter")
        if mode == "adapter":
            assert len(uploads(server)) == 2, "the base once, and the adapter"

        sent = len(uploads(server))
        again = run("create", *where, "--mode", mode)
        assert again.output.count("unchanged") == 2 and len(uploads(server)) == sent
        assert creations(server) == ["base_model", "pure_grit_model"]

        listed = run("list", *where).output
        assert "0.32.0" in listed and facts["digest"][:12] in listed and " no " not in listed
        checked = run("verify", *where, "--mode", mode)
        # rendered, tokens and answers of two models; in mode adapter the arm's answers equal mode merged as well
        expected = 6 if mode == "merged" else 7
        assert checked.exit_code == 0 and checked.output.count("100%") == expected, checked.output

        assert "pure_grit_model: removed" in run("remove", "pure_grit_model", *where).output
        assert "pure_grit_model: was not there" in run("remove", "pure_grit_model", *where).output
        assert "base_model:latest" in server.models and "pure_grit_model:latest" not in server.models


def test_a_perturbed_adapter_is_noticed_with_its_first_token(tree):
    other = tree
    data = bytearray((other / "pure_grit/0/adapter.gguf").read_bytes())
    half = len(data) // 2
    data[half:] = bytes(b ^ 0x55 if i % 4 == 2 else b for i, b in enumerate(data[half:]))  # in the tensors' exponents
    (other / "pure_grit/0/adapter.gguf").write_bytes(data)
    with OllamaDouble() as server:
        where = ["--gguf", other, "--host", server.url, "--mode", "adapter"]
        assert run("create", *where).exit_code == 0
        checked = run("verify", "pure_grit_model", *where)
    assert checked.exit_code == 1
    assert "pure_grit_model (adapter): prompt 0: token" in checked.output
    assert "Likely cause: weights of the adapter" in checked.output, "no other scale of it is right"


def test_a_second_bos_is_noticed_as_a_template(tree):
    with OllamaDouble() as server:
        where = ["--gguf", tree, "--host", server.url]
        run("create", *where)
        server.misbehave = "wrong_template"
        checked = run("verify", "base_model", *where)
    assert checked.exit_code == 1 and "TEMPLATE" in checked.output and "0%" in checked.output


def test_where_no_server_answers_every_command_says_so(tree):
    for command in ("create", "list", "verify", "remove"):
        done = run(command, "--gguf", tree, "--host", "127.0.0.1:9")
        assert done.exit_code == 1 and "127.0.0.1:9" in done.output and "Traceback" not in done.output


def test_names_modes_and_folders_that_do_not_exist(tree, tmp_path):
    assert "pure_grid" in run("create", "pure_grid_model", "--gguf", tree).output
    assert "expected one of merged, adapter" in run("create", "--gguf", tree, "--mode", "both").output
    with pytest.raises(ExportError, match="dvc repro export"):
        find_served(tmp_path / "empty")


def test_damaged_references_are_named(tree, tmp_path):
    shutil.copytree(tree / "base/0", tmp_path / "base")
    for text, message in (("{", "JSON lines"), ('{"prompt": "x"}\n', "rendered"), ("", "at least one")):
        (tmp_path / "base" / REFERENCE).write_text(text)
        with pytest.raises(ExportError, match=message):
            read_references(tmp_path / "base")


def test_the_first_differing_token(exported):
    at, expected, got = first_token(exported / "base.gguf", "Good: 42", "Good: 43")
    assert (expected, got) == ("2", "3") and at > 0
    assert first_token(exported / "base.gguf", "Good", "Good: 4")[1] == ""


def test_later_seeds_are_tags_of_one_name(tree):
    for seed in ("3", "10"):
        shutil.copytree(tree / "pure_grit/0", tree / "pure_grit" / seed)
    names = [served.name for served in find_served(tree)]
    assert names == ["base_model", "pure_grit_model", "pure_grit_model:seed3", "pure_grit_model:seed10"]


def test_without_a_server_llama_cpp_verifies(tree, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    done = run("verify", "--gguf", tree, "--mode", "both")
    assert done.exit_code == 0 and done.output.count("100%") == 10 and "llama_cpp" in done.output, done.output
    named = run("verify", "--gguf", tree, "--backend", "ollama")
    assert named.exit_code == 1 and "no Ollama answers at http://127.0.0.1:9" in named.output
    assert "expected auto, ollama or llama_cpp" in run("verify", "--gguf", tree, "--backend", "llama").output
    assert "expected one of merged, adapter, both" in run("verify", "--gguf", tree, "--mode", "x").output


def test_with_a_server_it_is_the_one_that_is_verified(tree, monkeypatch):
    with OllamaDouble() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        assert run("create", "--gguf", tree).exit_code == 0
        done = run("verify", "--gguf", tree)
        assert done.exit_code == 0 and "ollama 0.32.0" in done.output
        server.requests.clear()
        assert run("verify", "--gguf", tree, "--backend", "llama_cpp").exit_code == 0 and not server.requests


def test_what_can_only_be_served_merged_has_no_adapter_row(tree):
    (tree / "pure_grit/0/adapter.gguf").unlink()
    done = run("verify", "--gguf", tree, "--mode", "both", "--backend", "llama_cpp")
    assert done.exit_code == 0 and done.output.count("100%") == 6, done.output
    refused = run("verify", "--gguf", tree, "--mode", "adapter", "--backend", "llama_cpp")
    assert refused.exit_code == 1 and "can be served merged only" in refused.output


def test_a_server_that_takes_no_adapters(tree):
    with OllamaDouble(version="0.34.1") as server:
        where = ["--gguf", tree, "--host", server.url]
        assert run("create", *where).exit_code == 0
        both = run("verify", *where, "--mode", "both")
        assert both.exit_code == 0 and "not supported" in both.output and both.output.count("100%") == 6
        alone = run("verify", "pure_grit_model", *where, "--mode", "adapter")
        assert alone.exit_code == 1 and "no longer supported" in alone.output
