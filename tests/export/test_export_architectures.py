"""Merged GGUF and adapter GGUF of other architectures than Llama say what Hugging Face says.

The models are random and tiny, with a SentencePiece tokenizer, as the converters take it. Biases and norms are random,
too: left at 0 and 1 they would hide one that is lost.
"""

import json
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from evaluation.tasks import general, render
from export import gguf
from export.engines.hf import HfEngine
from export.engines.llama_cpp import LlamaCppEngine
from tests.conftest import TEMPLATE
from tests.export.bare_tokenizer import without_prefix
from tests.export.verify_runs import logits_apart
from trainers.base import train_tokenizer

# Logits, whose standard deviation is above 1. Measured on the 6 prompts: at most 0.011 for merged weights (which are
# rounded to f16) and 0.009 for base + adapter; for Gemma-2 0.020 and 0.022. Without the adapter: 2.5 to 4.2.
TOLERANCE = 0.05
COMMON = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 3, "initializer_range": 0.15,
}  # fmt: skip
GEMMA = {"tie_word_embeddings": True, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 48}
CONFIGS = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 32}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (Gemma2Config, GEMMA),
    "phi3": (Phi3Config, {"original_max_position_embeddings": 256}),
}
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FUSED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Folders of the same pieces with and without a blank in front of a text (Gemma has none)."""
    questions = islice(general.questions(0, held_out=False), 400)
    texts = [t for _, p, a in questions for t in (render(TEMPLATE, p), a)]
    plain = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, 512, plain)
    return {True: plain, False: without_prefix(plain, tmp_path_factory.mktemp("bare") / "tokenizer")}


@pytest.fixture(scope="module")
def questions():
    prompts = [render(TEMPLATE, item.prompt) for item in general.retention_items(1, seed=5)[:4]]
    prompts.append(render(TEMPLATE, "é 漢字 🙂 {x}  two  blanks 12345"))
    return [*prompts, render(TEMPLATE, "one two three " * 12)]  # longer than Gemma's window


@dataclass
class Built:
    base: Path
    adapter: Path
    tokenizer: Path | None = None

    @property
    def folder(self):
        return self.base.parent

    def hf(self):
        return HfEngine(str(self.base), TEMPLATE, adapter=self.adapter, tokenizer=self.tokenizer)

    def export(self, name, adapter=None):
        merged = self.folder / name / "model"
        gguf.save_merged(str(self.base), adapter, merged, {})
        gguf.convert_model(merged, self.folder / f"{name}.gguf", name)
        return self.folder / f"{name}.gguf"


def build(architecture, tokenizers, folder):
    kind, own = CONFIGS[architecture]
    source = tokenizers[architecture != "gemma2"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**COMMON, **own}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            if architecture == "gemma2" and ".post_" in name:
                parameter.add_(3.0)  # layers weigh more than the embedding, or the last token is always repeated
    model.half().save_pretrained(folder / "base")
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / file, folder / "base" / file)
    return folder / "base"


def add_adapter(base, out, kind=AutoModelForCausalLM, **settings):
    """With B ≠ 0."""
    torch.manual_seed(1)
    model = kind.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, **{"lora_alpha": 8, "target_modules": "all-linear", **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(out)
    return out


def llama_cpp(file, adapter=None):
    return LlamaCppEngine(file, TEMPLATE, num_ctx=256, threads=1, adapter=adapter)


def distance(built, file, prompts, adapter=None):
    engine = LlamaCppEngine(file, TEMPLATE, num_ctx=256, threads=1, adapter=adapter)
    return logits_apart(built.hf(), engine, prompts)


QUICK = ("llama", "gemma2")


@pytest.mark.parametrize(
    "architecture", [*QUICK, *(pytest.param(n, marks=pytest.mark.full) for n in CONFIGS if n not in QUICK)]
)
def test_export_says_what_hugging_face_says(architecture, tokenizers, questions, tmp_path):
    folder = build(architecture, tokenizers, tmp_path)
    # transformers reads every tokenizer of Qwen2 as byte-level, whatever tokenizer_config.json says.
    built = Built(
        folder, add_adapter(folder, tmp_path / "adapter"), tokenizers[True] if architecture == "qwen2" else None
    )
    names = json.loads((built.adapter / "adapter_config.json").read_text())["target_modules"]
    assert {name.split(".")[-1] for name in names} == (FUSED if architecture == "phi3" else LAYERS)
    base, merged, adapter = built.export("base"), built.export("merged", built.adapter), tmp_path / "adapter.gguf"
    gguf.convert_adapter(built.adapter, built.base, adapter)
    assert distance(built, merged, questions) < TOLERANCE
    assert distance(built, base, questions, adapter) < TOLERANCE
    assert distance(built, base, questions) > 0.5, "the adapter changes nothing, so nothing is shown"


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"use_dora": True}),
        # Qwen3 has one matrix at both ends here: what is saved for one must not become the other's.
        ("qwen3", {"modules_to_save": ["lm_head", "input_layernorm"]}),
        pytest.param("qwen3", {"target_modules": ["q_proj", "lm_head"]}, marks=pytest.mark.full),
    ],
)
def test_what_no_adapter_file_holds_is_merged(architecture, settings, tokenizers, questions, tmp_path):
    base = build(architecture, tokenizers, tmp_path)
    built = Built(base, add_adapter(base, tmp_path / "adapter", **settings))
    assert distance(built, built.export("merged", built.adapter), questions) < TOLERANCE
    tied = AutoConfig.from_pretrained(tmp_path / "merged/model").tie_word_embeddings
    assert not tied, "the ends differ now"
