"""serving.json, Modelfile and folders of the export stage: read as they are meant, or refused by name."""

import re
import shutil

import pytest

from export import ExportError
from export.engines.engine import Raw, conversation
from export.engines.llama_cpp import Vocabulary
from export.go import FIND_LAST, go_of_turns, go_template
from export.modelfile import Serving
from export.served import FACTS, REFERENCE, find_served, modelfile_text, read_references, served_in
from tests.export.verify_runs import edit

TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
GO = FIND_LAST + "### Instruction:\n{{ $last }}\n\n### Response:\n"


def serving(**changes) -> Serving:
    return Serving(**{"template": TEMPLATE, "stop": ["###"], "num_ctx": 512, **changes})


def test_go_template_keeps_every_other_character_or_refuses():
    assert go_template(TEMPLATE) == GO
    assert go_template("a } b { {prompt} %s \n") == FIND_LAST + "a } b { {{ $last }} %s \n"
    twice = {"no slot": "found it 0 times", "{prompt}{prompt}": "found it 2 times"}
    for template, said in {**twice, "{{ .System }}{prompt}": "'{{'", "{{prompt}}": "'{{'"}.items():
        with pytest.raises(ExportError, match=said):
            go_template(template)


def test_the_text_is_what_ollama_documents(tmp_path):
    made = serving(stop=["###", 'say "x"', "\n\n"], go="{{ .System }}\n{{ .Prompt }}", system='Be "brief".')
    assert modelfile_text(made, tmp_path / "gguf/arm/0", tmp_path / "gguf/base/0/model.gguf") == (
        "FROM ../../base/0/model.gguf\n"
        "ADAPTER ./adapter.gguf\n"
        'TEMPLATE """{{ .System }}\n{{ .Prompt }}"""\n'
        'SYSTEM """Be "brief"."""\n'
        "PARAMETER num_ctx 512\n"
        "PARAMETER temperature 0.0\n"
        "PARAMETER top_k 1\n"
        "PARAMETER repeat_penalty 1.0\n"
        'PARAMETER stop "###"\n'
        'PARAMETER stop """say "x""""\n'
        'PARAMETER stop """\n\n"""\n'
    )
    first, *_, last = serving(license="MIT").modelfile().splitlines()
    assert (first, last) == ("FROM ./model.gguf", 'LICENSE "MIT"')


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"go": "no slot"}, r"go: expected a template that goes over \.Messages, got 'no slot'"),
        ({"go": f"{GO}!"}, "go: expected a template that makes .*Instruction.* of a question, got .*!'"),
        ({"go": f"{GO}{{{{ .Tools }}}}"}, r"go: .*got '\{\{ .Tools"),
        ({"stop": []}, "at least one word"),
        ({"stop": ["a", ""]}, "none empty"),
        ({"stop": ["a", "a"]}, "twice"),
        ({"num_ctx": 0}, "num_ctx"),
        ({"system": "Be brief."}, r"no \{\{ .System \}\}"),
        ({"license": 'a """ b'}, 'license: holds """'),
        ({"stop": ["a\u00a0b"]}, "stop: holds U\\+00A0"),
        ({"license": "a\r\nb"}, "license: holds U\\+000D"),
    ],
)
def test_what_no_modelfile_can_say_is_refused_by_name(changes, said):
    with pytest.raises(ExportError, match=said):
        serving(**changes).check()


def test_all_faults_are_listed_at_once():
    with pytest.raises(ExportError) as caught:
        serving(num_ctx=0, stop=[], license="").check()
    assert str(caught.value).count("\n  - ") == 3


@pytest.mark.parametrize(
    "asked",
    [
        "Stop at </s>.",
        Raw("a</s>b"),
        conversation("a", system="</s>"),
        conversation("a", turns=[("b", "</s>")]),
        conversation("a", turns=[("</s>", "b")]),
    ],
)
def test_no_server_is_asked_what_spells_out_a_control_token(asked):
    go = go_of_turns(TEMPLATE, "</s>")
    with pytest.raises(ExportError, match="</s>"):
        serving(go=go, control=["</s>"]).render(asked)
    assert "</s>" in serving(go=go).render(asked)
    with pytest.raises(ExportError, match="system: holds </s>"):
        serving(go=go, system="Say </s>.", control=["</s>"]).check()


def test_bos_must_not_come_twice():
    for token, more in (("<|begin_of_text|>", {}), ("<s>", {}), ("<bos>", {}), ("«bos»", {"bos_token": "«bos»"})):
        with pytest.raises(ExportError, match=f"starts with {re.escape(token)}.* twice"):
            serving(template=token + TEMPLATE, **more).check()
        serving(template=token + TEMPLATE, adds_bos=False).check()  # the template's own BOS is the only one
        serving(template="a " + token + TEMPLATE, **more).check()  # not leading


# --- folders ---------------------------------------------------------------------------------------------


def test_one_name_in_two_folders_is_refused_and_the_stage_goes_by_arm_and_seed(tree):
    """After the first seed was changed DVC leaves the folder of the old one."""
    first, second = tree / "pure_grit/0", tree / "pure_grit/1"
    shutil.copytree(first, second)
    for folder in (first, second):
        edit(folder, model_name="pure_grit_model")
    with pytest.raises(ExportError, match="'pure_grit_model'; remove") as caught:
        find_served(tree)
    assert str(first) in str(caught.value) and str(second) in str(caught.value)
    for folder, seed in ((first, 0), (second, 1)):
        served = served_in(folder, "pure_grit_model")
        assert (served.gguf, served.arm, served.seed) == (folder / "model.gguf", "pure_grit", seed)
        assert served.adapter_form().gguf == tree / "base/0/model.gguf"
    assert served_in(second, "another").name == "another" and served_in(second).name == "pure_grit_model"


def test_what_a_killed_export_left_is_no_model(tree):
    for name in ("0.4711.partial", "0.4711.old.partial", "old", "³"):
        shutil.copytree(tree / "pure_grit/0", tree / "pure_grit" / name)
    assert [served.name for served in find_served(tree)] == ["base_model", "pure_grit_model"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / FACTS).write_text('{"template": "x'), "Invalid JSON"),
        (lambda f: (f / FACTS).write_bytes(b"\xff\xfe"), "Invalid JSON"),
        (lambda f: (f / FACTS).write_text("[]"), "object"),
        (lambda f: edit(f, stop=None), "stop: Field required"),
        (lambda f: edit(f, num_ctx="256"), "num_ctx: Input should be a valid integer, got '256'"),
        (lambda f: edit(f, model_name=3), "model_name: Input should be a valid string, got 3"),
    ],
)
def test_damaged_facts_are_named(tree, spoil, said):
    folder = tree / "pure_grit/0"
    spoil(folder)
    with pytest.raises(ExportError, match="export again") as caught:
        find_served(tree)
    assert said in str(caught.value) and str(folder / FACTS) in str(caught.value)


def test_folders_and_files_that_are_not_there(tree, tmp_path):
    with pytest.raises(ExportError, match="dvc repro export"):
        find_served(tmp_path / "empty")
    with pytest.raises(ExportError, match=r"gguf/pure_grit/7/serving.json: no such file; run `dvc repro export`"):
        served_in(tree / "pure_grit/7")
    (tree / "pure_grit/0/model.gguf").unlink()
    with pytest.raises(ExportError, match=r"model\.gguf: expected a GGUF file, found none"):
        served_in(tree / "pure_grit/0")


def test_damaged_references_are_named(tmp_path):
    for text, message in (("{", "JSON lines"), ('{"prompt": "x"}\n', "rendered"), ("", "at least one")):
        (tmp_path / REFERENCE).write_text(text)
        with pytest.raises(ExportError, match=message):
            read_references(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"GGUF" + bytes(200)])
def test_a_missing_or_damaged_gguf_is_named(tmp_path, content):
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ExportError, match=r"model.gguf: expected a GGUF model, .* export again"):
        Vocabulary(file)
