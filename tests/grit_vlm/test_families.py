"""Ready configurations on tiny models with the real module names of each family."""

import copy

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from grit_vlm.config import LayerSelectionStrategy, ModalityConfig, ModelConfigError, ModelGRITConfig, SelectionError
from grit_vlm.config.families import FAMILIES, adaptable, adapted_modules, get_model_config, patterns_of

V, T = tiny_models.VISION_BLOCKS, tiny_models.TEXT_BLOCKS
WHOLE = {  # kind of tiny model → ready configuration, adapted modules of each modality
    "idefics3": ("idefics3", 4 * V, 4 * T, 1),
    "smolvlm": ("smolvlm", 4 * V, 4 * T, 1),
    "llava": ("llava", 4 * (V - 1), 4 * T, 2),  # the last block's output is not read
    "llava_siglip": ("llava", 4 * (V - 1), 4 * T, 2),
    "vipllava": ("llava", 4 * (V - 1), 4 * T, 2),
    "paligemma": ("paligemma", 4 * V, 4 * T, 1),
    "qwen2_vl": ("qwen2_vl", 2 * V, 4 * T, 2),
    "phi3_v": ("phi3_v", 4 * (V - 1), 2 * T, 2),
    "phi3_v_flat": ("phi3_v", 4 * (V - 1), 2 * T, 2),
}
READY = ("smolvlm_256m", "smolvlm_fast", "idefics3", "smolvlm", "llava", "qwen2_vl", "paligemma", "phi3_v")


def counts(model, config):
    return {modality: len(names) for modality, names in adapted_modules(model, config)[0].items()}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_ready_configuration_finds_all_attention_of_its_family(model_of, kind):
    name, *expected = WHOLE[kind]
    found, notes = adapted_modules(model_of(kind), get_model_config(name))
    assert [len(found[modality]) for modality in ("vision", "text", "cross_modal")] == expected and not notes
    assert {type(model_of(kind).get_submodule(name)) for names in found.values() for name in names} == {nn.Linear}


@pytest.mark.parametrize("kind", tiny_models.RUNNABLE)
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


@pytest.mark.parametrize("kind", ["llava_siglip", "paligemma"])
def test_the_pooling_heads_multihead_attention_is_left_alone(model_of, kind):
    model, head = model_of(kind), "model.vision_tower.head.attention"
    assert isinstance(model.get_submodule(head), nn.MultiheadAttention)
    assert isinstance(model.get_submodule(f"{head}.out_proj"), nn.Linear)
    config = ModelGRITConfig(vision=ModalityConfig(["model.vision_tower.head.attention.*"]))
    with pytest.raises(SelectionError, match=r"out_proj \(a weight of MultiheadAttention, which never calls it\)"):
        adapted_modules(model, config)


def test_a_block_that_no_gradient_reaches_is_not_adapted(model_of):
    stem = "model.vision_tower.encoder.layers"
    last = LayerSelectionStrategy.LAST_N
    config = ModelGRITConfig(vision=ModalityConfig([f"{stem}.*.mlp.fc1"], last, n_layers=1))
    assert adapted_modules(model_of("llava"), config)[0] == {"vision": [f"{stem}.{V - 2}.mlp.fc1"]}
    assert adapted_modules(model_of("paligemma"), config)[0] == {"vision": [f"{stem}.{V - 1}.mlp.fc1"]}
    config.vision.layer_patterns = [f"{stem}.{V - 1}.mlp.fc1"]
    with pytest.raises(SelectionError, match="behind the hidden state that the language model reads"):
        adapted_modules(model_of("llava"), config)


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision", "qwen2_5_vl"])
def test_variants_share_their_familys_names(kind):
    """Module names of variants, of transformers' own classes on the meta device."""
    import transformers

    prefix = {"llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision", "qwen2_5_vl": "Qwen2_5_VL"}[kind]
    with torch.device("meta"):
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(getattr(transformers, f"{prefix}Config")())
    assert model.config.model_type == kind
    config = ModelGRITConfig(vision=ModalityConfig(), text=ModalityConfig(), cross_modal=ModalityConfig())
    tower, text = model.config.vision_config, model.config.text_config.num_hidden_layers
    vision = 2 * tower.depth if kind == "qwen2_5_vl" else 4 * (tower.num_hidden_layers - (kind == "llava_next"))
    assert counts(model, config) == {"vision": vision, "text": 4 * text, "cross_modal": 2}


@pytest.mark.parametrize("kind", ["idefics3", "llava", "paligemma", "qwen2_vl"])
def test_peft_adapts_just_the_named_modules(model_of, kind):
    """Names as `target_modules`: PEFT takes endings of names, too, and none must end like another."""
    found, _ = adapted_modules(model_of(kind), get_model_config(WHOLE[kind][0]))
    names = [name for modules in found.values() for name in modules]
    adapted = get_peft_model(copy.deepcopy(model_of(kind)), LoraConfig(r=4, target_modules=names))
    prefix = "base_model.model."
    layers = {n.removeprefix(prefix): m for n, m in adapted.named_modules() if isinstance(m, LoraLayer)}
    assert sorted(layers) == sorted(names)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == sum(4 * (layer.in_features + layer.out_features) for layer in layers.values())


# SmolVLM-256M, in real widths and depths


def test_smolvlm_fast_is_eight_modules_with_document_003s_parameters(smolvlm_256m):
    found, notes = adapted_modules(smolvlm_256m, get_model_config("smolvlm_fast"))
    assert found == {
        "vision": [f"model.vision_model.encoder.layers.{i}.self_attn.q_proj" for i in (0, 1, 2)],
        "text": [f"model.text_model.layers.{i}.self_attn.v_proj" for i in (26, 27, 28, 29)],
        "cross_modal": ["model.connector.modality_projection.proj"],
    }
    assert not notes
    seven = [smolvlm_256m.get_submodule(name) for name in found["vision"] + found["text"]]
    assert sum(16 * (layer.in_features + layer.out_features) for layer in seven) == 122_880  # "~123K parameters"


def test_smolvlm_256m_is_twelve_eight_and_one(smolvlm_256m):
    config = get_model_config("smolvlm_256m")
    assert counts(smolvlm_256m, config) == {"vision": 12, "text": 8, "cross_modal": 1}
    assert config.max_layers_per_modality == 20
    found, _ = adapted_modules(smolvlm_256m, config)
    assert {name.split(".")[4] for name in found["vision"]} == {"0", "2", "4", "6", "8", "10"}
    assert {name.split(".")[3] for name in found["text"]} == {"26", "27", "28", "29"}


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_both_smolvlm_configurations_fit_both_generations(model_of, kind):
    assert counts(model_of(kind), get_model_config("smolvlm_fast")) == {"vision": 3, "text": 4, "cross_modal": 1}
    assert counts(model_of(kind), get_model_config("smolvlm_256m")) == {"vision": 12, "text": 8, "cross_modal": 1}


# Document 003's own configurations


def test_settings_without_patterns_take_the_familys(smolvlm_256m):
    every, last = LayerSelectionStrategy.EVERY_NTH, LayerSelectionStrategy.LAST_N
    research = ModelGRITConfig(
        model_name="research",
        vision=ModalityConfig(strategy=every, step_size=2, rank=12),
        text=ModalityConfig(strategy=last, n_layers=10, rank=16),
        max_layers_per_modality=15,
    )
    found, notes = adapted_modules(smolvlm_256m, research)
    assert {name.split(".")[4] for name in found["vision"]} == {"0", "2", "4"} and len(found["vision"]) == 12
    assert {name.split(".")[3] for name in found["text"]} == {"20", "21", "22"} and len(found["text"]) == 12
    assert len(notes) == 2
    memory = ModelGRITConfig(
        vision=ModalityConfig(rank=4, alpha=8), text=ModalityConfig(rank=4, alpha=8), max_layers_per_modality=5
    )
    assert counts(smolvlm_256m, memory) == {"vision": 4, "text": 4}


def test_the_familys_patterns_can_be_asked_for_by_name(model_of):
    model = model_of("idefics3")
    assert patterns_of(model, "text") == patterns_of(nn.Module(), "text", "smolvlm") == FAMILIES["idefics3"]["text"]
    patterns_of(model, "text").clear()
    assert FAMILIES["idefics3"]["text"]


def test_an_unknown_family_needs_patterns():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(
        SelectionError, match="text: expected layer_patterns for a model of type 'Sequential', got none"
    ):
        adapted_modules(model, ModelGRITConfig(text=ModalityConfig()))
    with pytest.raises(SelectionError, match="of type 'my_vlm'"):
        adapted_modules(model, ModelGRITConfig(model_type="my_vlm", text=ModalityConfig()))
    config = ModelGRITConfig(model_type="my_vlm", text=ModalityConfig(["*"]))
    assert adapted_modules(model, config) == ({"text": ["0"]}, [])


def test_a_configuration_of_another_family_names_near_misses(model_of):
    with pytest.raises(SelectionError) as caught:
        adapted_modules(model_of("idefics3"), get_model_config("llava"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 + 4 + 2 and "near misses: model.vision_model.encoder.layers.*.self_attn.q_proj" in lines[0]


# Names


@pytest.mark.parametrize("name", READY)
def test_ready_configurations_are_valid_and_ones_own(name):
    config = get_model_config(name)
    config.validate()
    config.vision.rank = 99
    assert get_model_config(name).vision.rank is None
    assert config.model_type in FAMILIES


def test_hub_ids_are_names():
    assert get_model_config("microsoft/Phi-3.5-vision-instruct") == get_model_config("phi3_v")
    assert get_model_config("HuggingFaceTB/SmolVLM-256M-Instruct") == get_model_config("smolvlm_256m")
    ids = {get_model_config(name).model_name for name in READY}
    assert all(get_model_config(hub_id).model_name == hub_id for hub_id in ids)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("smolvlm_fats", "smolvlm_fast"),
        ("SmolVLM-256M", "smolvlm_256m"),
        ("Qwen2-VL", "qwen2_vl"),
        ("PHI3_V", "phi3_v"),
        ("PaliGemma", "paligemma"),
        ("llava-hf/llava-1.5-13b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("microsoft/phi-3.5-vision-instruct", "microsoft/Phi-3.5-vision-instruct"),
    ],
)
def test_typos_are_answered(typo, meant):
    with pytest.raises(ModelConfigError) as caught:
        get_model_config(typo)
    message = str(caught.value)
    assert message.endswith(f"got {typo!r}; did you mean {meant!r}?") and all(name in message for name in READY)


def test_a_name_like_no_other_gets_no_guess():
    with pytest.raises(ModelConfigError) as caught:
        get_model_config("zzz")
    assert "did you mean" not in str(caught.value)
