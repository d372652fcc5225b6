"""Ready configurations on tiny models with the real module names of each family."""

import re

import pytest
import tiny_models
import torch
from torch import nn

from grit_vlm import GritVlmError
from grit_vlm.config.families import FAMILIES, adaptable, adapted_modules, get_model_config
from grit_vlm.config.model_configs import ModalityConfig, ModelGRITConfig
from grit_vlm.config.selection import LayerSelectionStrategy

V, T = tiny_models.VISION_BLOCKS, tiny_models.TEXT_BLOCKS
WHOLE = {  # kind of tiny model → ready configuration, adapted modules of each modality
    "idefics3": ("idefics3", 4 * V, 4 * T, 1),
    "smolvlm": ("smolvlm", 4 * V, 4 * T, 1),
    "llava": ("llava", 4 * (V - 1), 4 * T, 2),  # the last block's output is not read
    "llava_siglip": ("llava", 4 * (V - 1), 4 * T, 2),
    "vipllava": ("llava", 4 * (V - 1), 4 * T, 2),
    "paligemma": ("paligemma", 4 * V, 4 * T, 1),
    "qwen2_vl": ("qwen2_vl", 2 * V, 4 * T, 2),
}
READY = ("smolvlm_256m", "smolvlm_fast", "idefics3", "smolvlm", "llava", "qwen2_vl", "paligemma")


def counts(model, config):
    return {modality: len(names) for modality, names in adapted_modules(model, config)[0].items()}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_ready_configuration_finds_all_attention_of_its_family(model_of, kind):
    name, *expected = WHOLE[kind]
    found, notes = adapted_modules(model_of(kind), get_model_config(name))
    assert [len(found[modality]) for modality in ("vision", "text", "cross_modal")] == expected and not notes
    assert {type(model_of(kind).get_submodule(name)) for names in found.values() for name in names} == {nn.Linear}


@pytest.mark.parametrize("kind", tiny_models.BUILDERS)
def test_every_adapted_module_gets_a_gradient_and_every_other_has_a_reason(model_of, kind):
    """One backward pass through picture and text; without a gradient are just those that `adaptable` leaves out."""
    model = model_of(kind)
    model.zero_grad()
    model(**tiny_models.batch(model)).loss.backward()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    without = {n for n, m in linear.items() if m.weight.grad is None or not bool(m.weight.grad.abs().sum() > 0)}
    names, others = adaptable(model)
    assert set(linear) - set(names) == without
    assert all(others[name] != type(linear[name]).__name__ for name in without)


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision", "qwen2_5_vl"])
def test_variants_share_their_familys_names(kind):
    import transformers

    name = {"llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision", "qwen2_5_vl": "Qwen2_5_VL"}[kind]
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForConditionalGeneration")(getattr(transformers, f"{name}Config")())
    config = ModelGRITConfig(vision=ModalityConfig(), text=ModalityConfig(), cross_modal=ModalityConfig())
    tower, text = model.config.vision_config, model.config.text_config.num_hidden_layers
    vision = 2 * tower.depth if kind == "qwen2_5_vl" else 4 * (tower.num_hidden_layers - (kind == "llava_next"))
    assert counts(model, config) == {"vision": vision, "text": 4 * text, "cross_modal": 2}


def test_configurations_of_smolvlm_256m_have_document_003s_modules():
    vision = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    text = dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        head_dim=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = tiny_models.idefics3(vision | {"image_size": 512, "patch_size": 16}, text, scale_factor=4)
    fast, notes = adapted_modules(model, get_model_config("smolvlm_fast"))
    assert fast == {
        "vision": [f"model.vision_model.encoder.layers.{i}.self_attn.q_proj" for i in (0, 1, 2)],
        "text": [f"model.text_model.layers.{i}.self_attn.v_proj" for i in (26, 27, 28, 29)],
        "cross_modal": ["model.connector.modality_projection.proj"],
    }
    assert not notes
    seven = [model.get_submodule(name) for name in fast["vision"] + fast["text"]]
    assert sum(16 * (layer.in_features + layer.out_features) for layer in seven) == 122_880  # "~123K parameters"
    larger = get_model_config("smolvlm_256m")
    assert counts(model, larger) == {"vision": 12, "text": 8, "cross_modal": 1}
    assert larger.max_layers_per_modality == 20
    # Without patterns those of the family; a limit cuts whole blocks.
    every = ModalityConfig(strategy=LayerSelectionStrategy.EVERY_NTH, step_size=2)
    last = ModalityConfig(strategy=LayerSelectionStrategy.LAST_N, n_layers=10)
    found, notes = adapted_modules(model, ModelGRITConfig(vision=every, text=last, max_layers_per_modality=15))
    assert {name.split(".")[4] for name in found["vision"]} == {"0", "2", "4"} and len(found["vision"]) == 12
    assert {name.split(".")[3] for name in found["text"]} == {"20", "21", "22"} and len(found["text"]) == 12
    assert len(notes) == 2


def test_an_unknown_family_needs_patterns():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(GritVlmError, match="text: expected layer_patterns for .* of type 'Sequential', got none"):
        adapted_modules(model, ModelGRITConfig(text=ModalityConfig()))
    with pytest.raises(GritVlmError, match="of type 'my_vlm'"):
        adapted_modules(model, ModelGRITConfig(model_type="my_vlm", text=ModalityConfig()))
    config = ModelGRITConfig(model_type="my_vlm", text=ModalityConfig(["*"]))
    assert adapted_modules(model, config) == ({"text": ["0"]}, [])


def test_ready_configurations_are_valid_copies_with_a_hub_id():
    for name in READY:
        config = get_model_config(name)
        config.validate()
        config.vision.rank = 99
        assert get_model_config(name).vision.rank is None and config.model_type in FAMILIES
        assert get_model_config(config.model_name).model_name == config.model_name


def test_typos_are_answered():
    for typo, meant in (
        ("smolvlm_fats", "; did you mean 'smolvlm_fast'?"),
        ("Qwen2-VL", "; did you mean 'qwen2_vl'?"),
        ("llava-hf/llava-1.5-13b-hf", "; did you mean 'llava-hf/llava-1.5-7b-hf'?"),
        ("zzz", ""),
    ):
        with pytest.raises(GritVlmError, match=re.escape(f"got {typo!r}{meant}") + "$") as caught:
            get_model_config(typo)
        assert all(name in str(caught.value) for name in READY)
