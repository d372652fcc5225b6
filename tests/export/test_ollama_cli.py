"""`python -m export.ollama`: create, list, verify, remove, in both modes, against the double with real GGUF files."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from evaluation.backends.hf import HfBackend
from export.errors import ExportError
from export.ollama_cli import app
from export.serving import find_served
from export.verify import REFERENCE, first_token, read_references
from tests.conftest import TEMPLATE
from tests.ollama_double import OllamaDouble

pytestmark = pytest.mark.slow
TOKENS = 6


@pytest.fixture(scope="module")
def tree(exported, base_dir, adapter_dir, prompts, tmp_path_factory):
    """gguf/ as the export stage leaves it, for the base and one arm, with Hugging Face's answers."""
    root = tmp_path_factory.mktemp("gguf")
    facts = {"template": TEMPLATE, "stop": ["</s>"], "num_ctx": 256, "adds_bos": True, "bos_token": "<s>"}
    questions = [text.split("Instruction:\n")[1].split("\n\n### Response")[0] for text in prompts[:6]]
    for arm, file, adapter in (("base", "base.gguf", None), ("pure_grit", "model.gguf", adapter_dir)):
        folder = root / arm / "0"
        folder.mkdir(parents=True)
        shutil.copy(exported / file, folder / "model.gguf")
        if adapter:
            shutil.copy(exported / "adapter.gguf", folder / "adapter.gguf")
        (folder / "serving.json").write_text(json.dumps(facts))
        engine = HfBackend(str(base_dir), TEMPLATE, adapter=adapter)
        rows = []
        for question in questions:
            rendered = TEMPLATE.replace("{prompt}", question)
            ids = engine.tokenize(rendered)
            answer = engine.detokenize(engine.greedy(ids, TOKENS))
            row = {"prompt": question, "rendered": rendered, "ids": ids, "answer": answer, "max_tokens": TOKENS}
            rows.append(json.dumps(row))
        engine.close()
        (folder / REFERENCE).write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(autouse=True)
def own_records(tmp_path, monkeypatch):
    """What was registered where is remembered below the home folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


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
        assert checked.exit_code == 0 and checked.output.count("100%") == 6, checked.output

        assert "pure_grit_model: removed" in run("remove", "pure_grit_model", *where).output
        assert "pure_grit_model: was not there" in run("remove", "pure_grit_model", *where).output
        assert "base_model:latest" in server.models and "pure_grit_model:latest" not in server.models


def test_a_perturbed_adapter_is_noticed_with_its_first_token(tree, tmp_path):
    other = tmp_path / "gguf"
    shutil.copytree(tree, other)
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
    assert "adapter scale, merge or quantization" in checked.output


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
        find_served(tmp_path)


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


def test_later_seeds_are_tags_of_one_name(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "gguf")
    for seed in ("3", "10"):
        shutil.copytree(tree / "pure_grit/0", tmp_path / "gguf/pure_grit" / seed)
    names = [served.name for served in find_served(tmp_path / "gguf")]
    assert names == ["base_model", "pure_grit_model", "pure_grit_model:seed3", "pure_grit_model:seed10"]
