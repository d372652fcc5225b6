"""Merged GGUF and adapter GGUF of other architectures than Llama say what Hugging Face says.

The models are random and tiny, with a SentencePiece tokenizer, as the converters take it. Biases and norms are random,
too: left at 0 and 1 they would hide one that is lost.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from evaluation.tasks import general, render
from export import gguf
from export.engines.hf import HfEngine
from export.engines.llama_cpp import LlamaCppEngine
from tests.conftest import TEMPLATE
from tests.export.verify_runs import add_adapter, logits_apart, without_prefix

# Logits, whose standard deviation is above 1. Measured after each token of the 6 prompts: at most 0.022 for merged
# weights (rounded to f16) and 0.013 for base + adapter; for Gemma-2 0.036 and 0.036. Without the adapter: 3.9 to 5.9.
TOLERANCE = 0.05
COMMON = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 3, "initializer_range": 0.15,
}  # fmt: skip
CONFIGS = {
    "llama": {},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 48},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "phi3": {"original_max_position_embeddings": 256},
}
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FUSED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def prompts():
    asked = [item.prompt for item in general.retention_items(1, seed=5)[:4]]
    asked += ["é 漢字 🙂 {x}  two  blanks 12345", "one two three " * 12]  # longer than Gemma's window
    return [render(TEMPLATE, prompt) for prompt in asked]


class Built:
    """A base and an adapter below `folder`; of Gemma the tokenizer puts no blank in front of a text."""

    def __init__(self, architecture, tokenizer, folder, **settings):
        self.folder, self.base = folder, folder / "base"
        self.tokenizer = without_prefix(tokenizer, folder / "bare") if architecture == "gemma2" else tokenizer
        torch.manual_seed(0)
        config = AutoConfig.for_model(architecture, **{**COMMON, **CONFIGS[architecture]})
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                if architecture == "gemma2" and ".post_" in name:
                    parameter.add_(3.0)  # layers weigh more than the embedding, or the last token is always repeated
        model.half().save_pretrained(self.base)
        for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(self.tokenizer / file, self.base / file)
        self.adapter = add_adapter(self.base, folder / "adapter", **settings)

    def export(self, name, adapter=None):
        merged = self.folder / name / "model"
        gguf.save_merged(str(self.base), adapter, merged, {})
        gguf.convert_model(merged, self.folder / f"{name}.gguf", name)
        return self.folder / f"{name}.gguf"

    def distance(self, file, adapter=None):
        # transformers reads every tokenizer of Qwen2 as byte-level, whatever tokenizer_config.json says.
        hf = HfEngine(str(self.base), TEMPLATE, adapter=self.adapter, tokenizer=str(self.tokenizer))
        return logits_apart(hf, LlamaCppEngine(file, TEMPLATE, num_ctx=256, threads=1, adapter=adapter), prompts())


@pytest.mark.parametrize("architecture", CONFIGS)
def test_export_says_what_hugging_face_says(architecture, base_dir, tmp_path):
    built = Built(architecture, base_dir, tmp_path)
    names = json.loads((built.adapter / "adapter_config.json").read_text())["target_modules"]
    assert {name.split(".")[-1] for name in names} == (FUSED if architecture == "phi3" else LAYERS)
    base, merged, adapter = built.export("base"), built.export("merged", built.adapter), tmp_path / "adapter.gguf"
    gguf.convert_adapter(built.adapter, built.base, adapter)
    assert built.distance(merged) < TOLERANCE and built.distance(base, adapter) < TOLERANCE
    assert built.distance(base) > 2, "the adapter changes nothing, so nothing is shown"
    if architecture == "llama":  # a tenth too little of one B is noticed
        wrong, name = tmp_path / "wrong", "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
        shutil.copytree(built.adapter, wrong)
        weights = load_file(built.adapter / "adapter_model.safetensors")
        save_file({**weights, name: 0.9 * weights[name]}, wrong / "adapter_model.safetensors")
        gguf.convert_adapter(wrong, built.base, tmp_path / "wrong.gguf")
        assert built.distance(base, tmp_path / "wrong.gguf") > 3 * TOLERANCE


def test_uneven_ranks_and_rslora_in_fused_layers(base_dir, tmp_path):
    ranks, alphas = {"qkv_proj": 2, "layers.1.mlp.down_proj": 6}, {"gate_up_proj": 3, "layers.0.self_attn.o_proj": 20}
    built = Built("phi3", base_dir, tmp_path, use_rslora=True, rank_pattern=ranks, alpha_pattern=alphas)
    assert gguf.losses(built.adapter) == []
    gguf.convert_adapter(built.adapter, built.base, tmp_path / "adapter.gguf")
    assert built.distance(built.export("base"), tmp_path / "adapter.gguf") < TOLERANCE
    assert built.distance(built.export("merged", built.adapter)) < TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"use_dora": True}),
        # Qwen3 has one matrix at both ends here: what is saved for one must not become the other's.
        ("qwen3", {"modules_to_save": ["lm_head", "input_layernorm"]}),
        ("qwen3", {"target_modules": ["q_proj", "lm_head"]}),
    ],
)
def test_what_no_adapter_file_holds_is_merged(architecture, settings, base_dir, tmp_path):
    built = Built(architecture, base_dir, tmp_path, **settings)
    assert built.distance(built.export("merged", built.adapter)) < TOLERANCE
    tied = AutoConfig.from_pretrained(tmp_path / "merged/model").tie_word_embeddings
    assert not tied, "the ends differ now"
