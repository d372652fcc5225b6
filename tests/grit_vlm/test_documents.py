"""Names, fields and calls of documents 000, 001 and 003; docs/grit_vlm.md has those that are mended."""

import importlib
import inspect
from dataclasses import MISSING, fields
from operator import attrgetter

import small_vlm
import torch
from torch import nn

import grit_vlm
from grit_vlm import GRITLoRAConfig, GRITLoRALinear, ModalityConfig, ModelGRITConfig

NAMES = {
    "core.fisher_info": "FisherInformationMatrix compute_natural_gradient",
    "core.grit_lora": "GRITLoRAConfig GRITLoRALayer GRITLoRALinear",
    "models.vlm_adapter": "VLMGRITAdapter create_vlm_grit_adapter",
    "config": "ModelGRITConfig ModalityConfig LayerSelectionStrategy get_model_config get_device_config",
    "config.model_configs": "ModelGRITConfig ModalityConfig",
    "training.trainer": "GRITTrainer GRITTrainingArguments",
    "optimizers.natural_gradient": "create_grit_optimizer",
    "utils.projection": "MultiModalProjector create_linear_scheduler",
}
MEMBERS = {
    "FisherInformationMatrix": "fisher_diagonal kfac_factors",
    "GRITLoRALayer": "forward update_fisher_and_projection apply_natural_gradient_update compute_natural_gradient "
    "update_projection project_gradients lora_A lora_B scaling lora_dropout base_layer eigenvalues step_count",
    "VLMGRITAdapter": "update_mixed_modal_fisher get_mixed_modal_projections get_trainable_parameters get_grit_layers "
    "vision_layers text_layers cross_modal_layers multimodal_projector vision_scheduler text_scheduler",
    "MultiModalProjector": "compute_mixed_modal_projection",
    "GRITTrainer": "train training_step create_optimizer grit_args",
    "utils.projection": "create_cosine_scheduler",
}


def test_every_name_is_where_the_documents_have_it():
    for module, names in NAMES.items():
        for name in names.split():  # one thing by one name, wherever it is imported from
            assert getattr(importlib.import_module(f"grit_vlm.{module}"), name) is getattr(grit_vlm, name)
            assert name in dir(grit_vlm)
    for name, members in MEMBERS.items():
        missing = [member for member in members.split() if not hasattr(attrgetter(name)(grit_vlm), member)]
        assert not missing, name


def defaults(config):
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config)}


def test_the_fields_and_their_defaults():
    modality, model, layer = map(defaults, (ModalityConfig, ModelGRITConfig, GRITLoRAConfig))
    assert modality == {
        "layer_patterns": [], "strategy": grit_vlm.LayerSelectionStrategy.ALL, "n_layers": None, "step_size": None,
        "specific_indices": None, "rank": None, "alpha": None, "dropout": None, "enable_natural_gradient": True,
        "enable_projection": True, "fisher_approximation": "diagonal", "projection_budget": None,
    }  # fmt: skip
    shared = {
        "fisher_damping": 1e-4, "fisher_ema_decay": 0.95, "fisher_update_freq": 10, "projection_budget_start": 32,
        "projection_budget_end": 96, "projection_schedule": "linear",
    }  # fmt: skip
    assert model == {
        "model_name": "custom", "model_type": "custom", "vision": None, "text": None, "cross_modal": None,
        "fusion": None, "global_rank": 16, "global_alpha": 32, "global_dropout": 0.1, "max_layers_per_modality": None,
        **shared,
    }  # fmt: skip
    assert layer.items() >= shared.items()
    assert (layer["r"], layer["lora_alpha"], layer["lora_dropout"]) == (16, 32, 0.1)
    estimate = inspect.signature(grit_vlm.FisherInformationMatrix).parameters.values()
    named = [("damping", 1e-4), ("ema_decay", 0.95), ("update_freq", 10)]
    assert [(p.name, p.default) for p in estimate][:4] == [("approximation_type", "diagonal"), *named]
    assert {"fisher_update_freq", "enable_projection", "grit_optimizer_type"} <= {
        f.name for f in fields(grit_vlm.GRITTrainingArguments)}  # fmt: skip


def test_grit_lora_basic():
    """test_grit_simple.py of document 000, as written."""
    base_layer = nn.Linear(128, 64)

    config = GRITLoRAConfig(r=8, fisher_approximation="diagonal", enable_natural_gradient=True)

    grit_layer = GRITLoRALinear(base_layer, config)

    input_tensor = torch.randn(4, 128)
    output = grit_layer(input_tensor)
    assert torch.equal(output, base_layer(input_tensor))  # "should work like regular LoRA", whose B starts at zero

    loss = output.sum()
    loss.backward()
    assert grit_layer.activation_buffer  # "should populate gradient buffers"

    grit_layer.update_fisher_and_projection()

    assert grit_layer.fisher_matrix.fisher_diagonal is not None
    assert grit_layer.lora_A.grad is not None
    assert grit_layer.lora_B.grad is not None


def test_the_loop_of_document_000():
    model, grit_adapter = grit_vlm.create_vlm_grit_adapter(
        small_vlm.base(), small_vlm.settings(enable_projection=True, projection_budget_start=8), **small_vlm.LAYERS
    )
    optimizer = grit_vlm.create_grit_optimizer(
        grit_adapter.get_trainable_parameters(), grit_layers=grit_adapter.get_grit_layers(), lr=0.01, total_steps=4
    )
    for step in range(4):
        model(**small_vlm.batch(model, step)).loss.backward()
        if step % 2 == 0:
            changed = grit_adapter.update_mixed_modal_fisher()
            assert changed == {"vision": 2, "text": 2, "cross_modal": 1}
        optimizer.step()
        optimizer.zero_grad()
    projections = grit_adapter.get_mixed_modal_projections()
    assert {modality: len(layers) for modality, layers in projections.items()} == changed
