"""Merged GGUF and adapter GGUF of each family say what Hugging Face says; what llama.cpp cannot take is refused.

The models are random and tiny, with a tokenizer of the family's kind. Biases and norms are random, too: left at 0 and 1
they would hide one that is lost. The table in docs/serving.md is this file's.
"""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from evaluation.tasks import general, render
from export import ExportError, MergedOnlyError, gguf
from export.converters import split_name
from export.engines.hf import HfEngine
from export.engines.llama_cpp import LlamaCppEngine
from export.modelfile import Serving
from export.proof import problems, prove
from export.served import Served
from pipelines import check, profile
from pipelines.params import ConfigError
from tests.conftest import TEMPLATE
from tests.export.verify_runs import add_adapter, logits_apart, without_prefix

# Logits, whose standard deviation is above 1, after each token of the 6 prompts. Weights and updates are multiples of
# 1/64 and 1/128, so that merging rounds nothing, and llama.cpp computes in f32: with a rounding of either, a mixture
# would now and then ask other experts.
TOLERANCE = 0.05
COMMON = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "initializer_range": 0.15,
}  # fmt: skip
TIED, MOE = {"tie_word_embeddings": True}, {"num_experts_per_tok": 2}
GEMMA = {**TIED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 48}
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {
    **ROPE, "factor": 2.0, "original_max_position_embeddings": 256, "rope_type": "longrope",
    "short_factor": [1.0] * 8, "long_factor": [1 + i / 4 for i in range(8)],
}  # fmt: skip
YARN = {**ROPE, "rope_type": "yarn"}
FULL, SLIDING = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e4}
GEMMA3 = {"num_hidden_layers": 6, "rope_parameters": {"full_attention": FULL, "sliding_attention": SLIDING}}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 64, **MOE}
FAMILIES = {  # model_type, tokenizer, what else its configuration says
    "Llama 2": ("llama", "spm", {"num_key_value_heads": 4}),
    "Llama 3": ("llama", "llama-bpe", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "Llama with yarn": ("llama", "spm", {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True}),
    "Mistral": ("mistral", "spm", {"sliding_window": None, "head_dim": 32}),
    "Mixtral": ("mixtral", "spm", {"num_local_experts": 4, "sliding_window": None, **MOE}),
    "Qwen2": ("qwen2", "qwen2", TIED),
    "Qwen3": ("qwen3", "qwen2", {**TIED, "head_dim": 32}),
    "Qwen2-MoE": ("qwen2_moe", "qwen2", {"shared_expert_intermediate_size": 96, **EXPERTS}),
    "Qwen3-MoE": ("qwen3_moe", "qwen2", {"head_dim": 32, "norm_topk_prob": True, **EXPERTS}),
    "Gemma 2": ("gemma2", "bare", GEMMA),
    "Gemma 3": ("gemma3_text", "bare", {**GEMMA, **GEMMA3}),  # a full layer among those with a window
    "Phi-3": ("phi3", "spm", {"original_max_position_embeddings": 256, "partial_rotary_factor": 0.75}),
    "SmolLM2": ("llama", "smollm", TIED),
    "SmolLM3": ("smollm3", "llama-bpe", {**TIED, "num_hidden_layers": 4}),  # every fourth layer without positions
    "OLMo2": ("olmo2", "dbrx", {}),
    "Granite": ("granite", "smollm", {**TIED, **GRANITE}),
    "GPT-2": ("gpt2", "gpt-2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "GPT-NeoX": ("gpt_neox", "gpt-2", {}),
    "OPT": ("opt", "gpt-2", {}),
}
REFUSED = ("GPT-2", "GPT-NeoX", "OPT")
QUICK = ("Llama 2", "Llama 3", "Mixtral", "Gemma 2", "Phi-3", "Qwen2-MoE")  # the others only in `make test-all`
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LORA = {
    "Mixtral": LAYERS - {"gate_proj", "up_proj", "down_proj"},
    "Qwen3-MoE": LAYERS - {"gate_proj", "up_proj", "down_proj"},
    "Phi-3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
}
"""Modules that LoRA goes on, where these are others than LAYERS."""


# --- tokenizers and models --------------------------------------------------------------------------------------------

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES, DIGITS = partial(pre_tokenizers.ByteLevel, add_prefix_space=False), pre_tokenizers.Digits(individual_digits=True)
SPLITS = {
    **dict.fromkeys(("llama-bpe", "dbrx"), r"\p{N}{1,3}"), "qwen2": r"\p{N}", "none that llama.cpp has": r"\p{N}{2}"
}  # fmt: skip


def prompts():
    asked = [item.prompt for item in general.retention_items(1, seed=5)[:4]]
    # White space, digits and contractions are where splits differ; the last one is longer than Gemma's window.
    asked += ["é 漢字 🙂 {x}  two  blanks 12345\n\n\t I'm x_1=3.14", "one two three " * 12]
    return [render(TEMPLATE, prompt) for prompt in asked]


def byte_pairs(kind, folder):
    """A byte-level BPE tokenizer that splits text as llama.cpp's `kind` does."""
    made = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    if kind in SPLITS:
        word = pre_tokenizers.Split(Regex(WORDS % SPLITS[kind]), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([word, BYTES(use_regex=False)])
    else:
        made.pre_tokenizer = pre_tokenizers.Sequence([DIGITS, BYTES()]) if kind == "smollm" else BYTES()
    if kind == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|endoftext|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [f"{render(TEMPLATE, i.prompt)}{i.completion}" for i in general.retention_items(40, seed=5)]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    begin = special[0] if kind == "llama-bpe" else None
    if begin:
        made.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=begin, eos_token=special[1], pad_token=special[2]
    )
    tokenizer.save_pretrained(folder)
    return folder


class Built:
    """A base of a family below `folder`."""

    def __init__(self, family, spm, folder, **changes):
        self.folder, self.base = folder, folder / "base"
        kind, tokenizer, own = FAMILIES[family]
        makers = {"spm": lambda: spm, "bare": lambda: without_prefix(spm, folder / "bare")}
        self.tokenizer = makers.get(tokenizer, lambda: byte_pairs(tokenizer, folder / "tokenizer"))()
        read = AutoTokenizer.from_pretrained(self.tokenizer)
        ids = {name: getattr(read, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**COMMON, **ids, **own, **changes})
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                if "gemma" in kind and ".post_" in name:
                    parameter.add_(3.0)  # layers weigh more than the embedding, or the last token is always repeated
                parameter.copy_((parameter * 64).round() / 64)
        model.half().save_pretrained(self.base)
        for file in self.tokenizer.glob("tokenizer*"):
            shutil.copyfile(file, self.base / file.name)

    def adapt(self, **settings):
        self.adapter = add_adapter(self.base, self.folder / "adapter", **settings)
        weights = self.adapter / "adapter_model.safetensors"
        save_file({name: (w * 16).round() / 16 for name, w in load_file(weights).items()}, weights)
        return self

    def export(self, name, adapter=None):
        merged = self.folder / name / "model"
        gguf.save_merged(str(self.base), adapter, merged, {})
        gguf.convert_model(merged, self.folder / f"{name}.gguf", name)
        return self.folder / f"{name}.gguf"

    def hugging_face(self):
        # transformers reads every tokenizer of Qwen2 as byte-level, whatever tokenizer_config.json says.
        return HfEngine(str(self.base), TEMPLATE, adapter=self.adapter, tokenizer=str(self.tokenizer))

    def distance(self, file, adapter=None, num_ctx=256):
        hf, asked = self.hugging_face(), prompts()
        fit = [prompt for prompt in asked if len(hf.tokenize(prompt)) < num_ctx]
        return logits_apart(hf, in_process(file, adapter, num_ctx), fit)


def in_process(file, adapter=None, num_ctx=256):
    """In float32, as stage export compares."""
    unpacked = file.with_suffix(".f32")
    gguf.quantize(file, unpacked, "f32")
    return LlamaCppEngine(unpacked, TEMPLATE, num_ctx=num_ctx, threads=1, adapter=adapter, exact_cache=True)


# --- what works -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in QUICK else pytest.mark.full) for f in FAMILIES if f not in REFUSED],
)
def test_export_says_what_hugging_face_says(family, base_dir, tmp_path):
    built = Built(family, base_dir, tmp_path).adapt(target_modules=sorted(LORA.get(family, LAYERS)))
    gguf.check_base(str(built.base), {})
    gguf.check_context(str(built.base), {}, 256)
    base, merged, adapter = built.export("base"), built.export("merged", built.adapter), tmp_path / "adapter.gguf"
    gguf.convert_adapter(built.adapter, built.base, adapter)
    assert built.distance(merged) < TOLERANCE and built.distance(base, adapter) < TOLERANCE
    assert built.distance(base) > 1, "the adapter changes nothing, so nothing is shown"
    serving = Serving(template=TEMPLATE, stop=["</s>"], num_ctx=256)
    form = Served(family, "arm", 0, tmp_path, merged, None, serving)
    forms = [form, replace(form, gguf=base, adapter=adapter)]
    rows, _ = prove(built.hugging_face, lambda one: in_process(one.gguf, one.adapter), forms, prompts(), 12)
    assert problems(rows, 1.0) == [] and [row.counted for row in rows] == [1.0, 1.0]


def test_a_wrong_adapter_is_noticed(base_dir, tmp_path):
    """A tenth too little of one B."""
    built = Built("Llama 2", base_dir, tmp_path).adapt()
    weights, name = built.adapter / "adapter_model.safetensors", "model.layers.0.self_attn.v_proj.lora_B.weight"
    wrong = shutil.copytree(built.adapter, tmp_path / "wrong")
    tensors = load_file(weights)
    name = f"base_model.model.{name}"
    save_file({**tensors, name: 0.9 * tensors[name]}, wrong / weights.name)
    gguf.convert_adapter(wrong, built.base, tmp_path / "wrong.gguf")
    assert built.distance(built.export("base"), tmp_path / "wrong.gguf") > 3 * TOLERANCE


def test_uneven_ranks_and_rslora_in_fused_layers(base_dir, tmp_path):
    ranks, alphas = {"qkv_proj": 2, "layers.1.mlp.down_proj": 6}, {"gate_up_proj": 3, "layers.0.self_attn.o_proj": 20}
    built = Built("Phi-3", base_dir, tmp_path).adapt(use_rslora=True, rank_pattern=ranks, alpha_pattern=alphas)
    assert gguf.losses(built.adapter) == []
    gguf.convert_adapter(built.adapter, built.base, tmp_path / "adapter.gguf")
    assert built.distance(built.export("base"), tmp_path / "adapter.gguf") < TOLERANCE
    assert built.distance(built.export("merged", built.adapter)) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("Llama 2", {"use_dora": True}, "would lose use_dora"),
        # One matrix at both ends: what is saved for one must not become the other's.
        ("Qwen3", {"modules_to_save": ["lm_head", "input_layernorm"]}, "would lose modules_to_save"),
        ("Qwen3", {"target_modules": ["q_proj", "lm_head"]}, "would lose lm_head"),
        ("Qwen3", {"target_modules": ["q_proj", "embed_tokens"]}, "would lose embed_tokens"),
        ("Mixtral", {}, "would lose target_parameters"),  # all-linear: PEFT takes the experts as well
        ("Qwen3-MoE", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}, "experts"),
    ],
)
def test_what_no_adapter_file_holds_is_merged(family, settings, reason, base_dir, tmp_path):
    built = Built(family, base_dir, tmp_path).adapt(**settings)
    with pytest.raises(MergedOnlyError, match=reason):
        gguf.convert_adapter(built.adapter, built.base, tmp_path / "adapter.gguf")
    assert built.distance(built.export("merged", built.adapter)) < TOLERANCE
    if "lm_head" in str(settings):
        assert not AutoConfig.from_pretrained(tmp_path / "merged/model").tie_word_embeddings, "the ends differ now"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "longest", "reason"),
    [
        ("Mistral", {"sliding_window": 24}, 24, "not at a sliding window"),
        ("Phi-3", {"sliding_window": 24}, 24, "not at a sliding window"),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}, 24, "sliding window"),
        ("Phi-3", {"rope_parameters": LONG, "partial_rotary_factor": 1.0, "max_position_embeddings": 512},
         256, "takes longrope's long factors"),
        ("Llama 2", {"rope_parameters": {**ROPE, "rope_type": "dynamic"}, "max_position_embeddings": 128},
         128, "does not scale RoPE"),
    ],
)  # fmt: skip
def test_a_context_in_which_llama_cpp_goes_another_way(family, changes, longest, reason, base_dir, tmp_path):
    built = Built(family, base_dir, tmp_path, **changes).adapt()
    gguf.check_context(str(built.base), {}, longest)
    with pytest.raises(ExportError, match=f"num_ctx: expected at most {longest} .*{reason}.*; got 512"):
        gguf.check_context(str(built.base), {}, 512)
    merged = built.export("merged", built.adapter)
    assert built.distance(merged, num_ctx=512) > 1, "llama.cpp can do it now: take it out of gguf.check_context"
    if longest > 24:  # with room for prompts
        assert built.distance(merged, num_ctx=longest) < TOLERANCE


def smaller(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))


def without_pieces(base):
    (base / "tokenizer.model").unlink()


def of_no_known_split(base):
    byte_pairs("none that llama.cpp has", base)


def of_words(base):
    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    for file in base.glob("tokenizer*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<unk>").save_pretrained(base)


@pytest.mark.parametrize(
    ("family", "spoil", "reason"),
    [
        ("GPT-2", None, "GPT2LMHeadModel: it looks for n_ctx in the configuration, where transformers [0-9.]+ writes"),
        ("GPT-NeoX", None, "GPTNeoXForCausalLM: it looks for rotary_pct in the configuration, where transformers"),
        ("OPT", None, "OPTForCausalLM: it knows no such architecture"),
        ("OLMo2", of_no_known_split, "Olmo2ForCausalLM: it knows neither the BPE tokenizer nor the way it splits text"),
        ("OLMo2", smaller, "Olmo2ForCausalLM: the tokenizer has ids beyond the model's vocab_size"),
        ("OLMo2", of_words, "Olmo2ForCausalLM: it knows neither"),
        ("Gemma 2", without_pieces, "Gemma2ForCausalLM: its vocabulary cannot be loaded"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_converted_is_refused_in_a_sentence(family, spoil, reason, base_dir, tmp_path):
    base = Built(family, base_dir, tmp_path).base
    if spoil:
        spoil(base)
    with pytest.raises(ExportError, match=f"^llama.cpp's converter cannot take {reason}.*; choose a base") as refused:
        gguf.check_base(str(base), {})
    assert "\n" not in str(refused.value)
    if spoil is None:  # by stage check, before anything is trained
        section = check.parse_params(yaml.safe_load(profile.compose("smoke"))).prepare_base
        with pytest.raises(
            ConfigError, match=f"^prepare_base.source: {base}: llama.cpp's converter cannot take {reason}"
        ):
            check.check_base(section.model_copy(update={"source": str(base)}))


def test_an_adapter_on_a_module_that_the_converter_does_not_map(base_dir, adapter_dir, tmp_path):
    strange = shutil.copytree(adapter_dir, tmp_path / "strange")
    weights = strange / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "h_proj"): t for name, t in load_file(weights).items()}, weights)
    said = r"^llama.cpp's converter has no place for model\.layers\.0\.self_attn\.h_proj\.weight, so that .* merged$"
    with pytest.raises(MergedOnlyError, match=said):
        gguf.convert_adapter(strange, base_dir, tmp_path / "adapter.gguf")


@pytest.mark.parametrize("kind", ["llama-bpe", "dbrx", "qwen2", "smollm", "gpt-2", "none that llama.cpp has"])
def test_a_split_is_named_as_llama_cpp_names_it(kind, tmp_path):
    written = json.loads((byte_pairs(kind, tmp_path) / "tokenizer.json").read_text())
    assert split_name(written) == (None if kind.startswith("none") else kind)
