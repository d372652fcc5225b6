"""Settings of PEFT that fit nothing, or that leave a trace while the adapter is off, are refused."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from trainers import TrainingError, theirs
from trainers.adapters import pattern_problems


def llama(biases=False):
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, attention_bias=biases, **shape))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"modules_to_save": ["lm_heads"]}, "modules_to_save: 'lm_heads' fits no module; did you mean 'lm_head'"),
        (
            {"modules_to_save": ["embed_tokens", "norms"]},
            "modules_to_save: 'norms' fits no module; did you mean 'norm'",
        ),
        ({"rank_pattern": {"q_prj": 8}}, "rank_pattern: 'q_prj' fits no module with an adapter; did you mean 'q_proj'"),
        ({"rank_pattern": {"down_proj": 8}}, "rank_pattern: 'down_proj' fits no module with an adapter"),
        ({"alpha_pattern": {"layers.7.q_proj": 8}}, "alpha_pattern: 'layers.7.q_proj' fits no module"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern.q_proj: expected more than 0, got 0"),
        ({"exclude_modules": ["layers.5.self_attn.q_proj"]}, "exclude_modules: 'layers.5.self_attn.q_proj' fits no"),
        ({"exclude_modules": r".*layers\.9.*"}, "exclude_modules: .* fits no module"),
        ({"layers_to_transform": [0, 2]}, "layers_to_transform: expected numbers from 0 to 1, got 2"),
    ],
)
def test_what_fits_nothing_is_refused_with_the_nearest_name(settings, problem):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], **settings)
    (line,) = pattern_problems(llama(), config)
    assert re.search(problem, line)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules_to_save": ["lm_head", "model.norm"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"rank_pattern": {"q_proj": 8, "layers.1.self_attn.v_proj": 2, r".*\.0\.self_attn\.v_proj": 1}},
        {"alpha_pattern": {"self_attn.q_proj": 4}, "layers_to_transform": 1},
        {"exclude_modules": r".*layers\.1.*", "bias": "all"},
    ],
)
def test_what_fits_is_taken(settings):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], **settings)
    assert pattern_problems(llama(), config) == [] and get_peft_model(llama(), config)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_the_base_are_refused(bias):
    (line,) = pattern_problems(llama(biases=True), LoraConfig(target_modules=["q_proj"], bias=bias))
    assert "peft.bias: expected none" in line and bias in line


def adapter(folder, change=lambda tensors: tensors, **settings):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], **settings))
    model.save_pretrained(folder)
    file = folder / theirs.WEIGHTS
    save_file(change(load_file(file)), file)
    return folder


def with_nan(tensors):
    name = next(iter(tensors))
    return {**tensors, name: torch.full_like(tensors[name], torch.nan)}


def test_an_adapter_from_elsewhere_with_nan_or_without_scale_is_refused(tmp_path):
    assert theirs.problems(adapter(tmp_path / "fine")) == [] and theirs.load(llama(), tmp_path / "fine")
    (reason,) = theirs.problems(adapter(tmp_path / "zero", lora_alpha=0))
    assert "expected lora_alpha above 0, got 0" in reason
    with pytest.raises(TrainingError, match="expected finite numbers, got NaN or infinity in .*q_proj.lora_A.weight$"):
        theirs.load(llama(), adapter(tmp_path / "nan", with_nan))


def test_an_adapter_from_elsewhere_that_trains_the_bases_biases_is_refused(tmp_path):
    model = get_peft_model(llama(biases=True), LoraConfig(target_modules=["q_proj"], bias="all"))
    model.save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match="expected bias none on a base that has biases, got 'all'"):
        theirs.load(llama(biases=True), tmp_path)
