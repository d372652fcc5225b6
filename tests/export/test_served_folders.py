"""Which folders of the export stage are models, and what is said of damaged ones."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from export.errors import ExportError
from export.llama_engine import Vocabulary, file_precision
from export.ollama_cli import app
from export.serving import FACTS, find_served, served_in
from tests.ollama_double import OllamaDouble

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_records")]


def edit(folder, **changes):
    """Changes keys of serving.json; None takes one away."""
    file = folder / FACTS
    facts = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))


def test_one_name_in_two_folders_is_refused_and_the_stage_goes_by_arm_and_seed(tree):
    """After the first seed was changed DVC leaves the folder of the old one."""
    first, second = tree / "pure_grit/0", tree / "pure_grit/1"
    shutil.copytree(first, second)
    for folder in (first, second):
        edit(folder, model_name="pure_grit_model")
    for names in (None, ["pure_grit_model"]):
        with pytest.raises(ExportError, match="'pure_grit_model'; remove") as caught:
            find_served(tree, names=names)
        assert str(first) in str(caught.value) and str(second) in str(caught.value)
    assert [s.name for s in find_served(tree, names=["base_model"])] == ["base_model"], "others are not touched by it"
    for folder, seed in ((first, 0), (second, 1)):
        served = served_in(folder, "pure_grit_model")
        assert (served.gguf, served.arm, served.seed) == (folder / "model.gguf", "pure_grit", seed)
        assert served.adapter_form().gguf == tree / "base/0/model.gguf"
    assert served_in(second, "another").name == "another" and served_in(second).name == "pure_grit_model"


@pytest.mark.parametrize("name", ["0.4711.partial", "0.4711.old.partial", "old", "³"])
def test_what_is_left_of_a_killed_export_is_no_model(tree, name):
    shutil.copytree(tree / "pure_grit/0", tree / "pure_grit" / name)
    assert [(s.name, s.folder.name) for s in find_served(tree)] == [("base_model", "0"), ("pure_grit_model", "0")]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / FACTS).write_text('{"template": "x'), "expected JSON"),
        (lambda f: (f / FACTS).write_bytes(b"\xff\xfe"), "expected JSON"),
        (lambda f: (f / FACTS).write_text("[]"), "expected a JSON object, got list"),
        (lambda f: edit(f, stop=None), "expected the key 'stop'"),
        (lambda f: edit(f, num_ctx=None), "expected the key 'num_ctx'"),
        (lambda f: edit(f, num_ctx="256"), "num_ctx: expected int, got '256'"),
        (lambda f: edit(f, model_name=3), "model_name: expected str, got 3"),
    ],
)
def test_damaged_facts_are_named_and_break_no_other_model(tree, spoil, said):
    folder = tree / "pure_grit/0"
    spoil(folder)
    for look in (
        lambda: find_served(tree),
        lambda: served_in(folder),
        lambda: find_served(tree, names=["pure_grit_model"]),
    ):
        with pytest.raises(ExportError, match="export again") as caught:
            look()
        assert said in str(caught.value) and str(folder / FACTS) in str(caught.value)
    assert [s.name for s in find_served(tree, names=["base_model"])] == ["base_model"]


def test_a_folder_that_is_not_there(tree):
    with pytest.raises(ExportError, match=r"gguf/pure_grit/7/serving.json: no such file; run `dvc repro export`"):
        served_in(tree / "pure_grit/7")
    (tree / "pure_grit/0/model.gguf").unlink()
    with pytest.raises(ExportError, match="expected GGUF files, found none at"):
        served_in(tree / "pure_grit/0")


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"GGUF" + bytes(200)])
def test_a_missing_or_damaged_gguf_is_named(tmp_path, content):
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    for look in (file_precision, Vocabulary):
        with pytest.raises(ExportError, match=r"model.gguf: expected a GGUF model, .* export again"):
            look(file)


# --- what is written down of a registration ---------------------------------------------------------------


def create(*arguments):
    return CliRunner().invoke(app, ["create", *map(str, arguments)])


def test_what_was_registered_is_written_beside_the_folder_and_not_where_one_stands(tree, tmp_path, monkeypatch):
    edit(tree / "pure_grit/0", model_name="team/pure grit:v2")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with OllamaDouble() as double:
        done = create("--gguf", "../gguf", "--host", double.url)
        assert done.exit_code == 0, done.output
    assert not list((tmp_path / "elsewhere").iterdir())
    files = sorted(f.name for f in (tmp_path / "outputs/ollama").iterdir())
    assert files == ["base_model-merged.json", "team-pure-grit-v2-merged.json"]
    assert json.loads((tmp_path / "outputs/ollama" / files[1]).read_text())["name"] == "team/pure grit:v2"


def test_where_it_cannot_be_written_down_one_is_told(tree, tmp_path):
    (tmp_path / "outputs").write_text("in the way")
    with OllamaDouble() as double:
        done = create("base_model", "--gguf", tree, "--host", double.url)
    assert done.exit_code == 1 and "Traceback" not in done.output and not isinstance(done.exception, OSError)
    assert "outputs/ollama/base_model-merged.json: the model 'base_model' is registered" in done.output
