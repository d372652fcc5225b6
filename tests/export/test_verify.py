"""Verification: the whole table, the control, and what it needs of files and servers."""

import shutil

import pytest
from gguf import GGUFReader

from export.adapter_file import changes_nothing, scale_of, scaled_copy
from export.engines import Reference, as_decoded
from export.errors import ExportError
from export.llama_engine import LlamaCpp
from export.modelfile import go_template
from export.ollama import connect, register, resolve_host
from export.ollama_engine import OllamaServer
from export.serving import find_served, read_modelfile
from export.verify import read_references, verify
from tests.export.verify_runs import ARM, answers, model, one, opened, rewrite
from tests.ollama_double import OllamaDouble

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_records")]


def test_all_models_in_both_modes(tree, kind):
    with opened(kind) as (backend, double):
        rows = [row for served in find_served(tree) for row in verify(backend, served)]
        assert double is None or double.models == {}, "what was registered for the check is gone"
    assert [(r.name, r.mode) for r in rows] == [("base_model", "merged"), (ARM, "merged"), (ARM, "adapter")]
    for row in rows:
        assert (row.rendered, row.counted, row.answered, row.first) == (1.0, 1.0, 1.0, None), row
        assert (row.backend, row.prompts, row.problem(1.0)) == (kind, 6, None)
        assert (row.server_digest is None) is (row.stored_sha256 is None) is (kind == "llama_cpp")
    assert [(r.equal_to_merged, r.perturbed_noticed) for r in rows] == [(None, None), (None, None), (1.0, True)]
    assert rows[0].gguf_sha256 == rows[2].gguf_sha256 and rows[2].adapter_sha256 and not rows[1].adapter_sha256


def test_a_registered_model_is_asked_as_it_is_and_the_other_mode_beside_it(tree):
    served = model(tree)
    with opened("ollama") as (backend, double):
        register(double.url, ARM, served.gguf, served.spec)
        double.requests.clear()
        merged, adapter = verify(backend, served)
        asked = {b["model"] for _, path, b in double.requests if path == "/api/generate"}
        made = [b["model"] for _, path, b in double.requests if path == "/api/create"]
        assert ARM in asked and ARM not in made and len(made) == 2, "adapter and control, under names of their own"
        assert (
            list(double.models) == [f"{ARM}:latest"] and merged.server_digest == double.models[f"{ARM}:latest"].digest
        )
        assert adapter.server_digest not in (None, merged.server_digest)


def test_a_release_without_adapters_is_no_fault_of_the_model(tree):
    with OllamaDouble(version="0.34.1") as double:
        merged, adapter = verify(OllamaServer(double.url), model(tree))
        assert double.models == {}
    assert merged.problem(1.0) is None and merged.answered == 1.0
    assert adapter.unsupported and adapter.problem(1.0) is None and adapter.prompts == 0 and adapter.rendered is None
    assert "0.34.1" in adapter.first and "no longer supported" in adapter.first


# --- the control -----------------------------------------------------------------------------------------


def test_scaled_copies_are_llama_cpps_own_scale(tree, tmp_path):
    form = model(tree).adapter_form()
    alpha, rank = scale_of(form.adapter)
    whole = shutil.copy(form.adapter, tmp_path / "whole.gguf")
    for factor in (0.5, 3.0):
        scaled_copy(whole, tmp_path / "copy.gguf", factor)
        assert scale_of(tmp_path / "copy.gguf") == (alpha * factor, rank)
        expected = answers(form, factor)
        shutil.copy(tmp_path / "copy.gguf", form.adapter)
        assert answers(form) == expected
        shutil.copy(whole, form.adapter)
    assert answers(form, 0.5) != answers(form), "or the lines above show nothing"
    with pytest.raises(ExportError, match="other than 0"):
        scaled_copy(form.adapter, tmp_path / "copy.gguf", 0)
    with pytest.raises(ExportError, match="expected adapter.lora.alpha"):
        scaled_copy(form.gguf, tmp_path / "copy.gguf", 2)


def test_an_adapter_that_changes_nothing_is_named(tree, kind):
    served = model(tree)
    adapter = served.folder / "adapter.gguf"
    reader = GGUFReader(adapter, "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith(".lora_b"):
            tensor.data[:] = 0
    reader.data.flush()
    assert changes_nothing(adapter)
    base = answers(model(tree, "base_model"))
    rewrite(served.folder, answer=lambda row: base[row["prompt"]])
    with opened(kind) as (backend, _):
        row = one(verify(backend, served, ["adapter"]))
    assert row.answered == 1 and row.perturbed_noticed is False
    assert "The adapter changes nothing: all its B (or all its A) are zero" in row.first
    assert "a perturbed adapter is not noticed" in row.problem(0.0)


def test_a_control_that_changes_nothing_makes_the_check_worthless(tree):
    served = model(tree)
    assert not changes_nothing(served.folder / "adapter.gguf")
    row = one(verify(LlamaCpp(), served, ["adapter"], control_scale=1.0 + 1e-6))
    assert row.answered == 1 and row.perturbed_noticed is False
    assert "none of 6 answers differs" in row.first and row.problem(0.0) is not None


@pytest.mark.parametrize(
    ("text", "answer", "decoded"),
    [
        (" 12", "12", "12"),  # SentencePiece: Hugging Face drops the first blank
        ("  12", " 12", " 12"),
        (" 12", " 12", " 12"),  # byte-level BPE: it keeps it
        ("12", " 12", "12"),  # a blank that the engine leaves out is a difference
        (" 13", "12", "13"),
        (" ", "", " "),
        ("", "12", ""),
    ],
)
def test_the_first_blank(text, answer, decoded):
    assert as_decoded(text, answer) == decoded


# --- files and failures ----------------------------------------------------------------------------------


def test_modelfiles_are_found_from_any_working_directory(tree, tmp_path, monkeypatch):
    """As `ollama create NAME -f Modelfile` reads them: FROM and ADAPTER are relative to the Modelfile."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name, adapted in (("Modelfile", False), ("Modelfile.adapter", True)):
        spec, gguf, adapter = read_modelfile(tree / "pure_grit/0" / name)
        assert gguf.is_file() and (adapter is not None) is adapted and (adapter is None or adapter.is_file())
        with OllamaDouble() as double, connect(double.url) as client:
            blobs = {path: client.create_blob(path) for path in filter(None, (gguf, adapter))}
            client.create("m", files={gguf.name: blobs[gguf]}, adapters=adapter and {adapter.name: blobs[adapter]},
                          template=spec.template, parameters=spec.parameters)  # fmt: skip
            served = model(tree) if not adapted else model(tree).adapter_form()
            reference = read_references(served.folder)[0]
            text = client.generate("m", reference.prompt, options={"num_predict": reference.max_tokens}).response
            assert text == reference.answer


@pytest.mark.parametrize("spoil", ["missing", "damaged", "absolute", "another file"])
def test_a_modelfile_that_is_not_this_models(tree, spoil):
    file = tree / "pure_grit/0/Modelfile"
    if spoil == "missing":
        file.unlink()
    else:
        changed = {
            "damaged": "FROM",
            "absolute": f"FROM {file.parent}/model.gguf",
            "another file": "FROM ../../base/0/model.gguf",
        }
        file.write_text(file.read_text().replace("FROM ./model.gguf", changed[spoil]))
    with pytest.raises(ExportError, match=r"Modelfile: .*(dvc repro export|export again)"):
        verify(LlamaCpp(), model(tree), ["merged"])


def test_a_server_that_dies_leaves_an_error_that_says_so(tree):
    with opened("ollama") as (backend, double):
        double.misbehave = "die"
        with pytest.raises(ExportError, match="ollama serve"):
            verify(backend, model(tree), ["merged"])
    with pytest.raises(ExportError, match="no Ollama answers"):
        OllamaServer(resolve_host("127.0.0.1:9"))


def test_nothing_stays_on_the_server_when_a_check_breaks_off(tree):
    with opened("ollama") as (backend, double):
        double.misbehave = "drop"
        with pytest.raises(ExportError, match="the connection to Ollama"):
            verify(backend, model(tree))
        made = [body["model"] for _, path, body in double.requests if path == "/api/create"]
        assert len(made) == 1 and made[0].startswith("grit-verify-") and double.models == {}


def test_a_prompt_that_does_not_fit_is_refused(tree):
    served = model(tree)
    with LlamaCpp().open(served) as engine, pytest.raises(ExportError, match="raise num_ctx"):
        engine.ask(Reference("word " * 400, "", [], "", 1))
    assert go_template(served.facts["template"]) == served.written_spec().template
