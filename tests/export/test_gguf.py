"""Merging, conversion, quantization: what comes out is what was trained."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

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
        ({"use_dora": True}, "use_dora"),
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
    with pytest.raises(ExportError, match=word):
        gguf.convert_adapter(wrong, tmp_path, tmp_path / "out.gguf")


# Scales that a GGUF adapter has no place for. The trained adapter has r 4 and α 8, so s = 2.
UNEVEN = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 3, r"layers\.[1]\.mlp\.down_proj": 1},
    "alpha_pattern": {"v_proj": 24, "model.layers.1.self_attn.q_proj": 3},
}
RSLORA = {"use_rslora": True, "lora_alpha": 4}  # 4/√4 = 2 again
ODD = {"uneven": UNEVEN, "rslora": RSLORA, "both": {**UNEVEN, "use_rslora": True}}


def with_config(source, out, changes):
    """A copy of an adapter with another configuration."""
    shutil.copytree(source, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return out


def cut(source, out, changes, dtype=torch.float32):
    """The same with the tensors cut to the ranks that the configuration then says, by SVD of B A."""
    from peft.utils.other import get_pattern_key

    with_config(source, out, changes)
    ranks = changes.get("rank_pattern", {})
    weights = load_file(out / "adapter_model.safetensors")
    for name in [n for n in weights if n.endswith("lora_A.weight")]:
        other, module = name.replace("lora_A", "lora_B"), name.removesuffix(".lora_A.weight")
        k = ranks.get(get_pattern_key(ranks.keys(), module.removeprefix("base_model.model.")), 4)
        u, s, vh = torch.linalg.svd(weights[other] @ weights[name], full_matrices=False)
        weights[name] = (s[:k, None].sqrt() * vh[:k]).to(dtype).contiguous()
        weights[other] = (u[:, :k] * s[:k].sqrt()).to(dtype).contiguous()
    save_file(weights, out / "adapter_model.safetensors")
    return out


@pytest.fixture(scope="module")
def odd_adapters(base_dir, adapter_dir, tmp_path_factory):
    """Kind → (adapter, its GGUF, the GGUF that leaves the scales out), the last for one kind at a time."""
    made = {}
    for kind, changes in ODD.items():
        folder = tmp_path_factory.mktemp(kind)
        adapter = cut(adapter_dir, folder / "odd", changes)
        gguf.convert_adapter(adapter, base_dir, folder / "folded.gguf")
        if kind != "both":
            lost = with_config(adapter, folder / "lost", {"alpha_pattern": {}, "use_rslora": False})
            gguf.convert_adapter(lost, base_dir, folder / "lost.gguf")
        made[kind] = (adapter, folder / "folded.gguf", folder / "lost.gguf")
    return made


def products(file):
    """Tensor name → alpha/k·B·A of a GGUF adapter, as llama.cpp takes it."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {t.name: torch.tensor(np.array(t.data)).double() for t in reader.tensors}
    halves = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    return {
        n: alpha / tensors[f"{n}.lora_a"].shape[0] * tensors[f"{n}.lora_b"] @ tensors[f"{n}.lora_a"] for n in halves
    }


def deltas(base_dir, adapter):
    """The same names → s·B·A as PEFT has it; rows of q as llama.cpp orders them for its rotary embedding."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float64), adapter)
    found = {}
    for i, layer in enumerate(model.base_model.model.model.layers):
        q, v, down = layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.down_proj
        for name, module in (("attn_q", q), ("attn_v", v), ("ffn_down", down)):
            a, b = (getattr(module, f"lora_{x}")["default"].weight.detach().double() for x in "AB")
            delta = module.scaling["default"] * b @ a
            if name == "attn_q":
                heads, rows, columns = model.config.num_attention_heads, *delta.shape
                delta = delta.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
            found[f"blk.{i}.{name}.weight"] = delta
    return found


def relative(got, expected):
    return max(float((got[n] - d).norm() / d.norm()) for n, d in expected.items())


@pytest.mark.parametrize("kind", ODD)
def test_scale_and_rank_of_every_module_are_peft_s(base_dir, odd_adapters, kind):
    adapter, folded, lost = odd_adapters[kind]
    expected = deltas(base_dir, adapter)
    got = products(folded)
    assert got.keys() == expected.keys() and len(got) == 6
    assert relative(got, expected) < 1e-6
    if lost.exists():
        assert relative(products(lost), expected) > 0.4, "the scale is lost without folding"


@pytest.mark.parametrize("kind", ["uneven", "rslora"])
def test_llama_cpp_answers_as_peft_whatever_the_scales(base_dir, odd_adapters, exported, prompts, kind):
    adapter, folded, lost = odd_adapters[kind]

    def llama_cpp(file):
        return lambda: LlamaCppBackend(exported / "base.gguf", TEMPLATE, num_ctx=256, adapter=file)

    hf = {"hf": lambda: HfBackend(str(base_dir), TEMPLATE, adapter=adapter)}
    result = parity.compare({**hf, "folded": llama_cpp(folded), "lost": llama_cpp(lost)}, prompts, 16, reference="hf")
    assert result["token_ids_equal"] == 1.0
    assert result["pairs"]["hf/folded"] >= 11 / 12, result["first_difference"]
    assert result["pairs"]["hf/lost"] <= 9 / 12
    assert logit_difference(base_dir, adapter, llama_cpp(folded)(), prompts) < 0.05
    assert logit_difference(base_dir, adapter, llama_cpp(lost)(), prompts) > 0.5


def logit_difference(base_dir, adapter, engine, prompts):
    """Largest difference of the logits after each prompt."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32), adapter)
    worst = 0.0
    for prompt in prompts:
        ids = engine.tokenize(prompt)
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([ids])).logits[0, -1]
        engine.prefill(ids)
        pointer = engine._api.llama_get_logits_ith(engine._llm.ctx, -1)
        got = torch.tensor(np.ctypeslib.as_array(pointer, shape=(engine._llm.n_vocab(),)).copy())
        worst = max(worst, float((got - expected).abs().max()))
    engine.close()
    return worst


@pytest.mark.parametrize("changes", [{}, {"rank_pattern": UNEVEN["rank_pattern"]}])
def test_adapters_that_need_no_folding_are_converted_as_they_are(base_dir, adapter_dir, tmp_path, changes):
    adapter = cut(adapter_dir, tmp_path / "plain", changes)
    gguf.convert_adapter(adapter, base_dir, tmp_path / "out.gguf")
    arguments = ["--base", str(base_dir), "--outfile", str(tmp_path / "direct.gguf"), "--outtype", "f32", str(adapter)]
    gguf._convert("convert_lora_to_gguf.py", arguments, tmp_path / "direct.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "direct.gguf").read_bytes()
    assert relative(products(tmp_path / "out.gguf"), deltas(base_dir, adapter)) < 1e-6


def test_a_folded_copy_is_a_peft_adapter_of_the_same_meaning(base_dir, odd_adapters, tmp_path):
    adapter = odd_adapters["both"][0]
    before = {f.name: f.read_bytes() for f in adapter.iterdir()}
    assert gguf.fold_scales(adapter, tmp_path / "copy")
    assert {f.name: f.read_bytes() for f in adapter.iterdir()} == before, "the trained adapter was changed"
    config = json.loads((tmp_path / "copy/adapter_config.json").read_text())
    assert not config["use_rslora"] and not config["alpha_pattern"]
    expected, got = deltas(base_dir, adapter), deltas(base_dir, tmp_path / "copy")
    assert relative(got, expected) < 1e-6


def test_16_bit_adapters_are_not_rounded_twice(base_dir, adapter_dir, tmp_path):
    adapter = cut(adapter_dir, tmp_path / "half", UNEVEN, dtype=torch.bfloat16)
    gguf.convert_adapter(adapter, base_dir, tmp_path / "half.gguf")
    assert relative(products(tmp_path / "half.gguf"), deltas(base_dir, adapter)) < 1e-6


def test_the_folded_adapter_has_the_same_bytes_each_time(base_dir, odd_adapters, tmp_path):
    adapter, folded, _ = odd_adapters["uneven"]
    gguf.convert_adapter(adapter, base_dir, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == folded.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_alpha": 5, "r": 3},  # 5/3·3/5 is not 1 in floating point
        {"alpha_pattern": {"q_proj": 8}},
        {"use_rslora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 5}},  # the first that fits
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 5, "q_proj": 2}},
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


def test_tensors_of_another_rank_than_the_configuration_says_are_refused(base_dir, adapter_dir, tmp_path):
    wrong = with_config(adapter_dir, tmp_path / "wrong", {"rank_pattern": {"q_proj": 2}})
    with pytest.raises(ExportError, match=r"q_proj\.lora_A\.weight: expected rank 2, .* got 4"):
        gguf.convert_adapter(wrong, base_dir, tmp_path / "out.gguf")
    (wrong / "adapter_model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"no adapter_model\.safetensors"):
        gguf.convert_adapter(wrong, base_dir, tmp_path / "out.gguf")


def test_the_export_stage_takes_an_adapter_with_uneven_ranks_and_scales(base_dir, odd_adapters, tmp_path, monkeypatch):
    from pipelines import export, prepare_base, prepare_data, profile
    from pipelines.config import parse_params

    raw = yaml.safe_load(profile.compose("smoke"))
    raw["prepare_base"]["source"] = str(base_dir)
    monkeypatch.chdir(tmp_path)
    params = parse_params(raw)
    prepare_data.run(params)
    prepare_base.run(params)
    adapter = tmp_path / "adapters/baseline_lora/0"
    shutil.copytree(odd_adapters["both"][0], adapter)
    export.run(params, "base", 0)
    export.run(params, "baseline_lora", 0)
    out = tmp_path / "gguf/baseline_lora/0"
    result = json.loads((out / "parity.json").read_text())
    assert result["pairs"]["hf/base+adapter_gguf"] >= 0.9 and result["pairs"]["hf/merged_gguf"] >= 0.9
    assert relative(products(out / "adapter.gguf"), deltas(base_dir, adapter)) < 1e-6
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


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
