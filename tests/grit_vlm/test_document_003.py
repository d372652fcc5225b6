"""Document 003, from its first call to its last; see `mended` for those that it gets wrong."""

import copy
import logging

import document_world
import pytest
from mended import mended
from torch import nn

from grit_vlm import GRITLoRAConfig
from grit_vlm.config import (
    LayerSelectionStrategy,
    ModalityConfig,
    ModelGRITConfig,
    SelectionError,
)
from grit_vlm.models.vlm_adapter import VLMGRITAdapter

VISION, TEXT = "model.vision_model.encoder.layers", "model.text_model.layers"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return document_world.build(tmp_path_factory.mktemp("world"))


def counts(adapter):
    return {modality: len(names) for modality, names in adapter.layers.items()}


def blocks(names, stem):
    return sorted({int(name.removeprefix(f"{stem}.").split(".")[0]) for name in names})


# "Quick Start", "Available Predefined Configurations", "Examples by Use Case"


@mended(
    "smolvlm_fast: 7 layers in all",
    "counts(adapter)",
    "Eight: the document's pattern for the projector matches nothing in SmolVLM, so that its seven lack it.",
)
def test_smolvlm_fast(world, caplog):
    model = world.model()
    with caplog.at_level(logging.INFO, "grit"):
        adapter = VLMGRITAdapter(
            model=model,
            config=GRITLoRAConfig(),
            model_config_name="smolvlm_fast",
        )
    assert counts(adapter) == {"vision": 3, "text": 4, "cross_modal": 1}
    assert blocks(adapter.vision_layers, VISION) == [0, 1, 2]  # first_n
    assert blocks(adapter.text_layers, TEXT) == [26, 27, 28, 29]  # last_n
    assert adapter.cross_modal_layers == ["model.connector.modality_projection.proj"]
    assert "applied to 8 layers" in caplog.text


@mended(
    "smolvlm_fast: ~123K parameters",
    "parameters(adapter, 'vision', 'text')",
    "Right for the seven; the projector, 12288 to 576 wide, has 205,824 more.",
)
def test_parameters_at_the_widths_of_smolvlm(smolvlm_256m):
    def parameters(adapter, *modalities):
        layers = [adapter.grit_layers[name] for m in modalities for name in adapter.layers[m]]
        return sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers)

    adapter = VLMGRITAdapter(copy.deepcopy(smolvlm_256m), GRITLoRAConfig(), model_config_name="smolvlm_fast")
    assert parameters(adapter, "vision", "text") == 122_880
    assert parameters(adapter, "cross_modal") == 205_824


def test_smolvlm_256m(world):
    adapter = VLMGRITAdapter(
        model=world.model(),
        config=GRITLoRAConfig(),
        model_config_name="smolvlm_256m",
    )
    assert counts(adapter) == {"vision": 12, "text": 8, "cross_modal": 1}
    assert blocks(adapter.vision_layers, VISION) == [0, 2, 4, 6, 8, 10]  # every_2nd
    assert blocks(adapter.text_layers, TEXT) == [26, 27, 28, 29]  # last_n
    assert adapter.model_config.max_layers_per_modality == 20


# "Layer Selection Strategies"


@pytest.mark.parametrize(
    ("strategy", "parameters", "expected"),
    [
        (LayerSelectionStrategy.ALL, {}, range(12)),
        (LayerSelectionStrategy.FIRST_N, {"n_layers": 3}, [0, 1, 2]),
        (LayerSelectionStrategy.LAST_N, {"n_layers": 8}, range(4, 12)),
        (LayerSelectionStrategy.EVERY_NTH, {"step_size": 2}, range(0, 12, 2)),
        (LayerSelectionStrategy.SPECIFIC, {"specific_indices": [0, 5, 10]}, [0, 5, 10]),
        (LayerSelectionStrategy.SKIP_FIRST_LAST, {}, range(1, 11)),
    ],
)
def test_strategies(world, strategy, parameters, expected):
    config = ModelGRITConfig(vision=ModalityConfig([f"{VISION}.*.self_attn.q_proj"], strategy, **parameters))
    adapter = VLMGRITAdapter(world.model(), config)
    assert adapter.vision_layers == [f"{VISION}.{i}.self_attn.q_proj" for i in expected]
    assert strategy.value == strategy.name.lower()


# "Creating Custom Configurations"


def test_a_custom_configuration(world):
    custom_config = ModelGRITConfig(
        model_name="my-custom-vlm",
        model_type="custom",
        vision=ModalityConfig(
            layer_patterns=[
                "model.vision_model.encoder.layers.*.self_attn.q_proj",
                "model.vision_model.encoder.layers.*.self_attn.v_proj",
            ],
            strategy=LayerSelectionStrategy.FIRST_N,
            n_layers=5,
            rank=8,
            alpha=16,
        ),
        text=ModalityConfig(
            layer_patterns=["model.text_model.layers.*.self_attn.q_proj"],
            strategy=LayerSelectionStrategy.LAST_N,
            n_layers=6,
            rank=12,
            alpha=24,
        ),
        global_rank=16,
        global_alpha=32,
        max_layers_per_modality=10,
    )
    adapter = VLMGRITAdapter(model=world.model(), config=custom_config)
    assert counts(adapter) == {"vision": 10, "text": 6}
    ranks = {m: {adapter.grit_layers[n].lora_A.shape[0] for n in names} for m, names in adapter.layers.items()}
    assert ranks == {"vision": {8}, "text": {12}}
    assert {layer.scaling for layer in adapter.grit_layers.values()} == {2.0}
    adapter.manager.open()
    adapter.model(**world.batch()).loss.backward()
    assert set(adapter.update_mixed_modal_fisher().values()) == {10, 6}


def test_layers_of_ones_own_instead_of_a_configurations(world):
    adapter = VLMGRITAdapter(
        model=world.model(),
        config=GRITLoRAConfig(),
        model_config_name="smolvlm_fast",
        vision_layers=[
            "model.vision_model.encoder.layers.0.self_attn.q_proj",
            "model.vision_model.encoder.layers.1.self_attn.v_proj",
        ],
    )
    assert adapter.vision_layers == [f"{VISION}.0.self_attn.q_proj", f"{VISION}.1.self_attn.v_proj"]
    assert counts(adapter) == {"vision": 2, "text": 4, "cross_modal": 1}


# "Layer Pattern Matching"


@mended(
    "model.multi_modal_projector.*",
    "ModalityConfig(['model.connector.modality_projection.proj'])",
    "The projector of Idefics3 and SmolVLM has this name; the other pattern is an error that names it.",
)
def test_patterns(world):
    def config(cross_modal):
        vision = ModalityConfig(["model.vision_model.encoder.layers.*.self_attn.q_proj"])
        text = ModalityConfig(["model.text_model.layers.*.self_attn.*_proj"])
        return ModelGRITConfig(vision=vision, text=text, cross_modal=cross_modal)

    with pytest.raises(SelectionError, match="connector.modality_projection.proj"):
        VLMGRITAdapter(world.model(), config(ModalityConfig(["model.multi_modal_projector.*"])))
    adapter = VLMGRITAdapter(world.model(), config(ModalityConfig(["model.connector.modality_projection.proj"])))
    assert counts(adapter) == {"vision": 12, "text": 30 * 4, "cross_modal": 1}
    with pytest.raises(SelectionError, match="matches nothing"):  # `*` stops at dots
        VLMGRITAdapter(world.model(), ModelGRITConfig(text=ModalityConfig(["model.text_model.*.q_proj"])))


# "Troubleshooting"


@mended(
    "✓ GRIT applied to 0 layers",
    "VLMGRITAdapter(model, config, model_config_name='smolvlm_fast')",
    "Patterns without a match are an error, which names what is there.",
)
def test_no_layers(world, model_of):
    model, config = model_of("llava"), GRITLoRAConfig()
    with pytest.raises(SelectionError) as raised:
        VLMGRITAdapter(model, config, model_config_name="smolvlm_fast")
    assert "model.vision_tower.encoder.layers.*.self_attn.q_proj" in str(raised.value)

    adapter = VLMGRITAdapter(world.model(), config, model_config_name="smolvlm_fast")
    available = [name for name, module in adapter.model.named_modules() if isinstance(module, nn.Linear)]
    assert len([name for name in available if name.endswith("base_layer")]) == 8


def test_too_many_layers(world, caplog):
    config = ModelGRITConfig(vision=ModalityConfig(), max_layers_per_modality=20)
    VLMGRITAdapter(world.model(), config)
    assert "vision: limited to 20 of 48 modules" in caplog.text  # "to 20 (was 48)"

    config.max_layers_per_modality = 10
    assert counts(VLMGRITAdapter(world.model(), config)) == {"vision": 8}  # two whole blocks

    config.max_layers_per_modality = None
    config.vision.strategy = LayerSelectionStrategy.EVERY_NTH
    config.vision.step_size = 3
    assert blocks(VLMGRITAdapter(world.model(), config).vision_layers, VISION) == [0, 3, 6, 9]


def test_memory(world):
    config = ModelGRITConfig(
        vision=ModalityConfig(rank=4, alpha=8),
        text=ModalityConfig(rank=4, alpha=8),
        max_layers_per_modality=5,
    )
    adapter = VLMGRITAdapter(world.model(), config)
    assert counts(adapter) == {"vision": 4, "text": 4}  # a whole block of either
    assert {layer.lora_A.shape[0] for layer in adapter.grit_layers.values()} == {4}


# "Examples by Use Case": the one that is not above


@mended(
    "Result: ~15 layers",
    "sum(counts(adapter).values())",
    "The limit is for each modality, and whole blocks of four projections are taken: 12 and 12.",
)
def test_research(world):
    custom_config = ModelGRITConfig(
        model_name="research",
        vision=ModalityConfig(strategy=LayerSelectionStrategy.EVERY_NTH, step_size=2, rank=12),
        text=ModalityConfig(strategy=LayerSelectionStrategy.LAST_N, n_layers=10, rank=16),
        max_layers_per_modality=15,
    )
    adapter = VLMGRITAdapter(world.model(), custom_config)
    assert blocks(adapter.vision_layers, VISION) == [0, 2, 4]
    assert blocks(adapter.text_layers, TEXT) == [20, 21, 22]
    assert sum(counts(adapter).values()) == 24
