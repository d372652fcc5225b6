"""Registering, verifying and scoring through a server: the double, and the real one at OLLAMA_HOST where it answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evaluation.backends.ollama import OllamaBackend
from export.ollama import AdaptersUnsupportedError, list_models, register, stored_model
from export.ollama_cli import app
from export.serving import find_served
from export.verify import read_references

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(a) for a in arguments])


@pytest.fixture
def where(server, tree):
    """Options of every command, for models whose names are this test's own."""
    server.rename(tree)
    return ["--gguf", tree, "--host", server.url]


def need_adapters(server, tree):
    """Skips where the real server is too new; the double takes them unless told otherwise."""
    form = find_served(tree, names=[f"{server.prefix}-pure_grit"])[0].adapter_form()
    try:
        register(server.url, f"{server.prefix}-probe", form.gguf, form.spec, form.adapter)
    except AdaptersUnsupportedError:
        pytest.skip(f"Ollama {server.version} takes no adapters")


def test_created_verified_in_both_modes_scored_and_removed(server, tree, where):
    made = run("create", *where)
    assert made.exit_code == 0, made.output
    names = [served.name for served in find_served(tree)]
    assert {f"{name}:latest" for name in names} <= set(list_models(server.url))

    checked = run("verify", *where, "--mode", "both")
    assert checked.exit_code == 0, checked.output
    rows = [line for line in checked.output.splitlines() if server.prefix in line and "│" in line]
    assert len(rows) == 3 and all(row.count("100%") == 3 for row in rows[:2])
    assert (rows[2].count("100%") == 4 and "yes" in rows[2]) or "not supported" in rows[2]

    for served in find_served(tree):
        with OllamaBackend(server.url, served.name, 256) as backend:
            for reference in read_references(served.folder):
                scored = backend.generate(reference.prompt, reference.max_tokens, ())
                assert (scored.text, scored.prompt_tokens) == (reference.answer, len(reference.ids))
    assert run("remove", *where).output.count("removed") == 2
    assert not [name for name in list_models(server.url) if name.startswith(server.prefix)]


def test_served_as_base_and_adapter(server, tree, where):
    need_adapters(server, tree)
    assert run("create", *where, "--mode", "adapter").exit_code == 0
    assert stored_model(server.url, f"{server.prefix}-pure_grit").mode == "adapter"
    assert stored_model(server.url, f"{server.prefix}-base").mode == "merged"
    checked = run("verify", *where, "--mode", "both")
    assert checked.exit_code == 0 and checked.output.count("100%") == 10, checked.output
    assert stored_model(server.url, f"{server.prefix}-pure_grit").mode == "adapter", "checked beside, not replaced"


def test_a_lost_scale_is_noticed_on_the_server(server, tree, where, tmp_path):
    from export.adapter_file import scaled_copy

    need_adapters(server, tree)
    form = find_served(tree, names=[f"{server.prefix}-pure_grit"])[0].adapter_form()
    scaled_copy(form.adapter, tmp_path / "lost.gguf", 0.5)
    register(server.url, form.name, form.gguf, form.spec, tmp_path / "lost.gguf")
    checked = run("verify", form.name, *where, "--mode", "adapter")
    assert checked.exit_code == 1 and "Likely cause: scale; the adapter counts 0.5 times" in checked.output


def test_what_is_not_there_is_not_verified(server, tree, where):
    checked = run("verify", *where)
    assert checked.exit_code == 1 and "python -m export.ollama create" in checked.output
    assert f"{server.prefix}-base, {server.prefix}-pure_grit" in checked.output


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_creating_what_is_unchanged_sends_nothing(server, tree, where, mode, tmp_path):
    """In this process, and in two at once."""
    if mode == "adapter":
        need_adapters(server, tree)
    first = run("create", *where, "--mode", mode)
    assert first.exit_code == 0 and first.output.count(": created") == 2, first.output
    before = list_models(server.url)
    if server.double:
        server.double.requests.clear()

    again = run("create", *where, "--mode", mode)
    assert again.exit_code == 0 and again.output.count(": unchanged") == 2, again.output
    command = [sys.executable, "-m", "export.ollama", "create", *map(str, where), "--mode", mode]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and output.count(": unchanged") == 2, output

    assert list_models(server.url) == before
    if server.double:
        seen = {(method, path.rpartition("/sha256")[0] or path) for method, path, _ in server.double.requests}
        assert seen and not seen & {("HEAD", "/api/blobs"), ("POST", "/api/blobs"), ("POST", "/api/create")}
        assert {path for _, path in seen} <= {"/api/version", "/api/tags"}
    facts = json.loads((tmp_path / f"outputs/ollama/{server.prefix}-pure_grit-{mode}.json").read_text())
    assert (facts["mode"], facts["server_version"], facts["created"]) == (mode, server.version, False)
    assert (facts["adapter_sha256"] is not None) is (mode == "adapter")
    assert facts["stored_sha256"] not in (None, facts["gguf_sha256"]), "creating rewrites the file; both are kept"


def test_two_processes_that_create_at_once_agree(server, tree, where, tmp_path):
    command = [sys.executable, "-m", "export.ollama", "create", *map(str, where)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert run("create", *where).output.count(": unchanged") == 2
    assert run("verify", *where).exit_code == 0
