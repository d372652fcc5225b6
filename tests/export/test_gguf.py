"""Merging, conversion, quantization: what comes out is what was trained."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation.backends.hf import HfBackend
from evaluation.backends.llama_cpp import LlamaCppBackend
from export import converters, gguf, parity
from export.errors import ExportError
from tests.conftest import TEMPLATE

pytestmark = pytest.mark.slow


def engines(base_dir, adapter, merged, base, adapter_gguf):
    return {
        "hf": lambda: HfBackend(str(base_dir), TEMPLATE, adapter=adapter),
        "merged_gguf": lambda: LlamaCppBackend(merged, TEMPLATE, num_ctx=256),
        "base+adapter_gguf": lambda: LlamaCppBackend(base, TEMPLATE, num_ctx=256, adapter=adapter_gguf),
    }


def test_merged_weights_are_base_plus_scaled_product(base_dir, adapter_dir, tmp_path):
    gguf.save_merged(str(base_dir), adapter_dir, tmp_path / "m", {})
    base, merged = (load_file(d / "model.safetensors") for d in (base_dir, tmp_path / "m"))
    lora = load_file(adapter_dir / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.v_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    expected = (base[f"{name}.weight"].float() + 8 / 4 * b @ a).half()  # α/r = 8/4
    assert torch.equal(merged[f"{name}.weight"], expected)
    assert torch.equal(merged["model.layers.1.self_attn.k_proj.weight"], base["model.layers.1.self_attn.k_proj.weight"])
    assert {w.dtype for w in merged.values()} == {torch.float16}


def test_export_equals_training(base_dir, adapter_dir, exported, prompts):
    result = parity.compare(
        engines(base_dir, adapter_dir, exported / "model.gguf", exported / "base.gguf", exported / "adapter.gguf"),
        prompts,
        16,
        reference="hf",
    )
    assert result["token_ids_equal"] == 1.0
    assert result["greedy_equal"] >= 11 / 12, result["first_difference"]
    assert result["prompts"] == 12 and set(result["pairs"]) == {"hf/merged_gguf", "hf/base+adapter_gguf"}


def test_the_adapter_changes_the_answers(exported, prompts):
    """Else parity of base and adapter would prove nothing."""
    base = LlamaCppBackend(exported / "base.gguf", TEMPLATE, num_ctx=256)
    model = LlamaCppBackend(exported / "model.gguf", TEMPLATE, num_ctx=256)
    differ = [base.greedy(base.tokenize(p), 12) != model.greedy(base.tokenize(p), 12) for p in prompts]
    assert sum(differ) > len(prompts) / 2


def test_a_perturbed_adapter_is_noticed(base_dir, adapter_dir, exported, prompts, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(adapter_dir, wrong)
    weights = {n: w * (0.3 if "lora_B" in n else 1) for n, w in load_file(wrong / "adapter_model.safetensors").items()}
    save_file(weights, wrong / "adapter_model.safetensors")
    gguf.convert_adapter(wrong, base_dir, tmp_path / "wrong.gguf")
    result = parity.compare(
        engines(base_dir, adapter_dir, exported / "model.gguf", exported / "base.gguf", tmp_path / "wrong.gguf"),
        prompts,
        16,
        reference="hf",
    )
    assert result["pairs"]["hf/base+adapter_gguf"] < 0.9
    assert result["pairs"]["hf/merged_gguf"] > result["pairs"]["hf/base+adapter_gguf"]
    message = parity.verdict(result, 0.99)
    assert "First difference: base+adapter_gguf, greedy" in message and "Likely cause: " in message


def test_a_missing_bos_is_noticed(base_dir, adapter_dir, exported, prompts, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    gguf.save_merged(str(base_dir), adapter_dir, folder, {})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is True
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    gguf.convert_model(folder, tmp_path / "nobos.gguf", "nobos")
    all_engines = engines(
        base_dir, adapter_dir, tmp_path / "nobos.gguf", exported / "base.gguf", exported / "adapter.gguf"
    )
    result = parity.compare(all_engines, prompts, 4, reference="hf")
    assert result["token_ids_equal"] == 0.0
    message = parity.verdict(result, 0.0)
    assert "token ids are equal for 0.0% of prompts" in message
    assert "BOS: the export leaves out the first token" in message


def test_same_model_same_bytes_wherever_it_is_converted(base_dir, exported, tmp_path):
    gguf.save_merged(str(base_dir), None, tmp_path / "elsewhere" / "model", {})
    gguf.convert_model(tmp_path / "elsewhere" / "model", tmp_path / "again.gguf", "base")
    assert (tmp_path / "again.gguf").read_bytes() == (exported / "base.gguf").read_bytes()


@pytest.mark.parametrize("quantization", ["q8_0", "q4_K_M"])
def test_quantization_is_smaller_and_runs(exported, prompts, tmp_path, quantization):
    gguf.quantize(exported / "model.gguf", tmp_path / "q.gguf", quantization)
    assert (tmp_path / "q.gguf").stat().st_size < 0.85 * (exported / "model.gguf").stat().st_size
    files = {"f16": exported / "model.gguf", "quantized": tmp_path / "q.gguf"}
    opened = {name: lambda file=file: LlamaCppBackend(file, TEMPLATE, num_ctx=256) for name, file in files.items()}
    result = parity.compare(opened, prompts, 4, reference="f16")
    assert result["token_ids_equal"] == 1.0
    assert result["greedy_equal"] >= {"q8_0": 0.75, "q4_K_M": 0.25}[quantization]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type"),
    ],
)
def test_what_a_gguf_adapter_would_lose_is_refused(adapter_dir, tmp_path, change, word):
    wrong = tmp_path / "wrong"
    shutil.copytree(adapter_dir, wrong)
    config = json.loads((wrong / "adapter_config.json").read_text())
    (wrong / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ExportError, match=word):
        gguf.check_adapter(wrong)


def test_a_folder_that_is_no_adapter(tmp_path):
    with pytest.raises(ExportError, match=r"adapter_config\.json"):
        gguf.check_adapter(tmp_path)


def test_merging_into_a_quantized_base_is_refused(base_dir, adapter_dir, tmp_path):
    folder = tmp_path / "quantized"
    shutil.copytree(base_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"prepare_base\.merge_source"):
        gguf.save_merged(str(folder), adapter_dir, tmp_path / "m", {})


def test_what_the_converter_says_reaches_the_user(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with pytest.raises(ExportError, match=r"convert_hf_to_gguf\.py failed"):
        gguf.convert_model(tmp_path, tmp_path / "out.gguf", "x")


def test_converters_come_with_the_installed_runtime():
    import llama_cpp

    place = converters.require()
    assert place.name == llama_cpp.__version__
    assert (place / "convert_lora_to_gguf.py").is_file() and (place / "gguf-py").is_dir()


def test_an_archive_with_another_hash_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setitem(converters.KNOWN, converters.folder().name, "0" * 64)

    def pip_download(command, **_):
        import subprocess
        from pathlib import Path

        (Path(command[-1]) / "llama_cpp_python.tar.gz").write_bytes(b"not what it says")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(converters.subprocess, "run", pip_download)
    with pytest.raises(ExportError, match="expected sha256 0000"):
        converters.fetch(tmp_path / "converters")
    assert not (tmp_path / "converters").exists()
