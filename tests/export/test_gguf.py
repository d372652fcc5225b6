"""Merging, conversion, quantization: what comes out is what was trained."""

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from export import ExportError, converters, gguf
from export.engines.llama_cpp import Vocabulary
from export.gguf import QUANTIZATIONS, REFUSED, Precision, contents, quantize
from trainers import gguf_file
from trainers.encode import control_tokens, encode_prompt
from trainers.models import load_tokenizer
from trainers.settings import BaseReference


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


def test_the_same_gives_the_same_bytes_wherever_it_is_converted(base_dir, adapter_dir, exported, tmp_path):
    gguf.save_merged(str(base_dir), None, tmp_path / "elsewhere" / "model", {})
    gguf.convert_model(tmp_path / "elsewhere" / "model", tmp_path / "again.gguf", "base")
    assert (tmp_path / "again.gguf").read_bytes() == (exported / "base.gguf").read_bytes()
    gguf.convert_adapter(adapter_dir, base_dir, tmp_path / "adapter.gguf")
    assert (tmp_path / "adapter.gguf").read_bytes() == (exported / "adapter.gguf").read_bytes()


def test_blanks_at_the_start_and_control_tokens_are_the_same_in_hugging_face_and_llama_cpp(base_dir, exported):
    tokenizer = load_tokenizer(BaseReference(str(base_dir)))
    assert gguf_file.control_tokens(exported / "base.gguf") == control_tokens(tokenizer)
    with Vocabulary(exported / "base.gguf") as vocabulary:
        for text in (" a", "  a", "    return x\n", "\ta", "\n a", " \n", " ", "\u2581a", "a</s> b", " a</s>  b", "a "):
            assert encode_prompt(tokenizer, text) == vocabulary.ids(text, bos=True), text


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj\.lora_A\.weight: expected rank 2, .* got 4"),
    ],
)
def test_what_a_gguf_adapter_would_lose_is_refused(adapter_dir, tmp_path, change, word):
    wrong = with_config(adapter_dir, tmp_path / "wrong", change)
    with pytest.raises(ExportError, match=word):
        gguf.convert_adapter(wrong, tmp_path, tmp_path / "out.gguf")


def test_an_adapter_without_tensors_is_refused(adapter_dir, tmp_path):
    wrong = with_config(adapter_dir, tmp_path / "wrong", {})
    (wrong / "adapter_model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"no adapter_model\.safetensors"):
        gguf.convert_adapter(wrong, tmp_path, tmp_path / "out.gguf")


def with_config(source, out, changes):
    shutil.copytree(source, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 5, "r": 3},  # 5/3·3/5 is not 1 in floating point
        {"use_rslora": True, "rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 5}},  # the first that fits
        {"alpha_pattern": {"^model.layers.1.mlp.down_proj": 9, "self_attn.[qv]_proj": 0.5}},
        {"rank_pattern": {"proj": 3, ".*v_proj": 7}, "alpha_pattern": {"attn.v_proj": 7, ".*1.*": 1}},
        {"lora_alpha": 0, "alpha_pattern": {"v_proj": 3}},
    ],
)
def test_factors_follow_peft_s_own_reading_of_the_patterns(tmp_path, changes):
    torch.manual_seed(0)
    tiny = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    wanted = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **changes}
    model = get_peft_model(LlamaForCausalLM(tiny), LoraConfig(**wanted, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**saved, **changes}))  # PEFT sorts the patterns
    model = PeftModel.from_pretrained(LlamaForCausalLM(tiny), tmp_path / "adapter")
    copied = gguf.fold_scales(tmp_path / "adapter", tmp_path / "copy")
    folder = tmp_path / ("copy" if copied else "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    assert alpha > 0, "llama.cpp reads 0 as no scale at all"
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 6
    for name, layer in layers.items():
        a, b = (weights[f"{name}.lora_{x}.weight"].double() for x in "AB")
        expected = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).double()
        assert torch.allclose(alpha / a.shape[0] * b @ a, expected, rtol=1e-5, atol=1e-7), name
    assert copied is (changes.get("use_rslora", False) or changes.get("alpha_pattern", {"q_proj": 8}) != {"q_proj": 8})
    assert (tmp_path / "copy").exists() is copied


def test_merging_into_a_quantized_base_is_refused(base_dir, adapter_dir, tmp_path):
    folder = shutil.copytree(base_dir, tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"prepare_base\.merge_source"):
        gguf.save_merged(str(folder), adapter_dir, tmp_path / "m", {})


def test_what_the_converter_says_reaches_the_user(tmp_path, monkeypatch):
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('no such architecture')")
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion/base.py").write_text("class TextModel:\n    get_vocab_base_pre = None")
    monkeypatch.setattr(converters, "require", lambda: tmp_path)
    with pytest.raises(ExportError, match=r"convert_hf_to_gguf\.py failed \(exit 1\):\nno such architecture"):
        gguf.convert_model(tmp_path, tmp_path / "out.gguf", "x")


def test_converters_come_with_the_installed_runtime():
    place = converters.require()
    assert place.name == llama_cpp.__version__
    assert (place / "convert_lora_to_gguf.py").is_file() and (place / "gguf-py").is_dir()


def test_an_archive_with_another_hash_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setitem(converters.KNOWN, converters.folder().name, "0" * 64)

    def pip_download(command, **_):
        (Path(command[-1]) / "llama_cpp_python.tar.gz").write_bytes(b"not what it says")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(converters.subprocess, "run", pip_download)
    with pytest.raises(ExportError, match="expected sha256 0000"):
        converters.fetch(tmp_path / "converters")
    assert not (tmp_path / "converters").exists()


# --- precisions ------------------------------------------------------------------------------------------------------

MATRICES = {"token_embd", "output", *(f"blk.0.{name}" for name in (
    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"))}  # fmt: skip
VECTORS = {"output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama of one layer with rows of 256: every format's block fits."""
    file, width, random = tmp_path_factory.mktemp("wide") / "f16.gguf", 256, np.random.default_rng(0)
    writer = GGUFWriter(file, "llama")
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": width, "feed_forward_length": width,
               "head_count": 4, "head_count_kv": 4, "layer_norm_rms_eps": 1e-5, "file_type": 1}  # fmt: skip
    for name, number in numbers.items():
        getattr(writer, f"add_{name}")(number)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(width)])
    writer.add_token_scores([0.0] * width)
    writer.add_token_types([1] * width)
    for name in sorted(MATRICES):
        writer.add_tensor(f"{name}.weight", random.normal(size=(width, width)).astype(np.float16))
    for name in sorted(VECTORS):
        writer.add_tensor(f"{name}.weight", random.normal(size=width).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_the_list_is_the_library_s():
    theirs = {
        name.removeprefix("LLAMA_FTYPE_").removeprefix("ALL_").removeprefix("MOSTLY_"): getattr(llama_cpp, name)
        for name in dir(llama_cpp)
        if name.startswith("LLAMA_FTYPE_") and name != "LLAMA_FTYPE_GUESSED"
    }
    assert sorted(q.upper() for q in (*QUANTIZATIONS, *REFUSED)) == sorted(theirs)
    assert all(theirs[name.upper()] == number for name, number in QUANTIZATIONS.items())


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_each_precision_is_made_and_read_back(wide, tmp_path, name):
    assert quantize(wide, tmp_path / "q.gguf", name) == 0, "rows of 256 need no fallback"
    made = contents(tmp_path / "q.gguf")
    assert int(GGUFReader(tmp_path / "q.gguf").fields["general.file_type"].contents()) == QUANTIZATIONS[name]
    assert made.size == (tmp_path / "q.gguf").stat().st_size
    assert sum(made.tensor_types.values()) == len(MATRICES | VECTORS)
    bits = {"f32": (32, 32), "f16": (16, 16.2), "bf16": (16, 16.2), "q8_0": (8.5, 8.7)}
    low, high = bits.get(name, (1, 8))
    assert low <= made.bits_per_weight <= high
    if name in ("f32", "f16", "bf16"):  # nothing else but vectors
        assert made.tensor_types == dict(Counter([name.upper()] * len(MATRICES) + ["F32"] * len(VECTORS)))
        return
    # The format itself, or for a mixture its main one: q4_K_M holds Q4_K, iq3_m IQ3_S.
    main = {"iq3_m": "IQ3_S", "iq3_s": "IQ3_S"}.get(name) or re.sub("_[SML]$", "", name.upper())
    assert made.tensor_types["F32"] == len(VECTORS) and made.tensor_types[main] >= len(MATRICES) / 2


def test_fallbacks_are_counted(exported, tmp_path):
    """Its rows have 64 and 128 weights: no K format's block fits."""
    assert quantize(exported / "base.gguf", tmp_path / "q8.gguf", "q8_0") == 0
    matrices = contents(tmp_path / "q8.gguf").tensor_types["Q8_0"]
    fallbacks = quantize(exported / "base.gguf", tmp_path / "q4.gguf", "q4_K_M")
    made = contents(tmp_path / "q4.gguf").tensor_types
    assert "Q4_K" not in made and made["Q5_0"] > 0
    # All but the output, for which llama.cpp chooses the larger format by itself where Q6_K does not fit.
    assert fallbacks == matrices - 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("iq2_xs", "'iq2_xs' cannot be used: .*importance matrix.*expected one of 'f32', 'f16'"),
        ("mxfp4_moe", "mixtures of experts"),
        ("q5", "expected one of 'f32', .*got 'q5'"),
        ("Q4_K_M", "did you mean 'q4_K_M'"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(name, words):
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(Precision).validate_python(name)


def test_llama_cpp_s_own_reason_reaches_the_user(exported, tmp_path):
    with pytest.raises(ExportError, match=r"to q1_0: .*no tensor type fallback is defined"):
        quantize(exported / "base.gguf", tmp_path / "q.gguf", "q1_0")
    with pytest.raises(ExportError, match=r"none\.gguf to q8_0: .*failed to load model"):
        quantize(tmp_path / "none.gguf", tmp_path / "q.gguf", "q8_0")


@pytest.mark.parametrize("size", [0, 4, 3000, -3000])
def test_a_damaged_file_is_refused(wide, tmp_path, size):
    (tmp_path / "cut.gguf").write_bytes(wide.read_bytes()[:size])
    with pytest.raises(ExportError, match=r"cut\.gguf: expected a GGUF file"):
        contents(tmp_path / "cut.gguf")
    with pytest.raises(ExportError, match=r"could not quantize .*cut\.gguf"):
        quantize(tmp_path / "cut.gguf", tmp_path / "q.gguf", "q8_0")
