"""Document 001, from its first call to its last; see `mended` for those that it gets wrong."""

import math

import document_world
import pytest
import torch
from mended import mended

from grit_vlm import GRITTrainer, GRITTrainingArguments, ModalityConfig, ModelGRITConfig, VLMGRITAdapter
from grit_vlm.config import adapted_modules, get_model_config
from grit_vlm.optimizers.natural_gradient import create_grit_optimizer
from grit_vlm.utils.projection import (
    create_adaptive_scheduler,
    create_cosine_scheduler,
    create_linear_scheduler,
    recommended_budget,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return document_world.build(tmp_path_factory.mktemp("world"))


def small_adapter(world, **settings):
    from grit_vlm import GRITLoRAConfig

    config = GRITLoRAConfig(r=4, lora_dropout=0.0, fisher_min_samples=8, **settings)
    return VLMGRITAdapter(world.model(), config, model_config_name="smolvlm_fast")


# "What We've Implemented"


@mended(
    "grit_vlm/config/model_configs.py: settings for Phi-3.5-vision, SmolVLM, LLaVA variants, Qwen2-VL",
    "get_model_config(name)",
    "That module has the classes; the settings come from `grit_vlm.config`, by a short name or a hub id.",
)
@pytest.mark.parametrize(
    ("name", "kind", "counts"),
    [
        ("microsoft/Phi-3.5-vision-instruct", "phi3_v", {"vision": 44, "text": 10, "cross_modal": 2}),
        ("HuggingFaceTB/SmolVLM-Instruct", "smolvlm", {"vision": 48, "text": 20, "cross_modal": 1}),
        ("llava-hf/llava-1.5-7b-hf", "llava", {"vision": 44, "text": 20, "cross_modal": 2}),
        ("Qwen/Qwen2-VL-2B-Instruct", "qwen2_vl", {"vision": 24, "text": 20, "cross_modal": 2}),
    ],
)
def test_a_ready_configuration_for_each_family(name, kind, counts, model_of):
    config = get_model_config(name)
    found, _ = adapted_modules(model_of(kind), config)
    assert {modality: len(modules) for modality, modules in found.items()} == counts


def test_grit_sgd_is_the_natural_gradient_update(world):
    adapter = small_adapter(world)
    optimizer = create_grit_optimizer(
        adapter.get_trainable_parameters(), optimizer_type="grit_sgd", grit_layers=adapter.get_grit_layers(), lr=1e-3
    )
    for layer in adapter.grit_layers.values():
        layer.lora_B.data.normal_(std=0.1)
    adapter.model(**world.batch()).loss.backward()
    adapter.update_mixed_modal_fisher()
    expected = {}
    for name, layer in adapter.grit_layers.items():  # θ_{t+1} = θ_t − η F⁻¹ ∇
        fisher = layer.fisher_matrix
        lam = fisher.damping * float(fisher.fisher_diagonal.mean())
        inverse = torch.linalg.inv(fisher.dense("B").double() + lam * torch.eye(layer.lora_B.numel()))
        step = 1e-3 * (inverse @ layer.lora_B.grad.double().flatten()).reshape(layer.lora_B.shape)
        expected[name] = layer.lora_B.detach().double() - step
    optimizer.step()
    for name, layer in adapter.grit_layers.items():
        torch.testing.assert_close(layer.lora_B.detach().double(), expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "optimizer_type", ["grit_sgd", "grit_adam", "grit_adam_preconditioned", "adaptive_sgd", "adaptive_adam"]
)
def test_every_optimizer_trains(world, optimizer_type):
    adapter = small_adapter(world)
    rate = 1e-4 if optimizer_type == "grit_sgd" else 1e-2
    region = {"kl_clip": 1e-5} if optimizer_type.startswith("adaptive") else {}
    optimizer = create_grit_optimizer(
        adapter.get_trainable_parameters(), optimizer_type, adapter.get_grit_layers(), lr=rate, **region
    )
    losses = []
    for _ in range(6):
        loss = adapter.model(**world.batch(0, 8)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], losses
    factor = adapter.manager.last_metrics.get("grit/trust_region_factor")
    if region:
        assert 0 < factor < 1  # the learning rate has been adapted
    else:
        assert factor in (None, 1.0)


@mended(
    "k_t = k_start + (k_end − k_start) × schedule(t)",
    "schedule.budget(t)",
    "A whole number, of what each estimate says in `FisherInformationMatrix.project`; beyond the rank, too, where the "
    "directions are coordinates.",
)
def test_schedules():
    k_start, k_end, steps = 32, 96, 40
    linear, cosine = (make(k_start, k_end, steps) for make in (create_linear_scheduler, create_cosine_scheduler))
    for schedule, way in ((linear, lambda t: t / steps), (cosine, lambda t: (1 - math.cos(math.pi * t / steps)) / 2)):
        for t in range(steps + 1):
            assert schedule.budget(t) == round(k_start + (k_end - k_start) * way(t))
    adaptive = create_adaptive_scheduler(k_start, k_end, steps)
    for _ in range(20):
        adaptive.observe(1.0)  # the loss stands still
    assert k_start < adaptive.budget() <= k_end
    progress = create_adaptive_scheduler(k_start, k_end, steps)
    for n in range(20):
        progress.observe(0.5**n)
    assert progress.budget() == k_start


def test_the_rule_of_thumb():
    a_vision = torch.zeros(400, 64)
    a_vision[:, :10] = torch.eye(10).repeat(40, 1)  # rank 10, all directions alike
    assert recommended_budget(a_vision) == 12


# "Usage Examples"


@mended(
    "trainer.train()",
    "GRITTrainer(model=model, grit_adapter=grit_adapter, args=arguments, train_dataset=world.dataset).train()",
    "The document's example has a trainer without making it.",
)
def test_basic_fine_tuning(world, tmp_path):
    from grit_vlm import GRITLoRAConfig, create_vlm_grit_adapter

    config = GRITLoRAConfig(
        r=16,
        fisher_approximation="diagonal",
        enable_natural_gradient=True,
        projection_budget_start=32,
        projection_budget_end=96,
    )
    model, grit_adapter = create_vlm_grit_adapter(world.folder, config=config)
    assert len(grit_adapter.grit_layers) == 12 * 4 + 30 * 4 + 1
    assert {layer.lora_A.shape[0] for layer in grit_adapter.grit_layers.values()} == {16}
    arguments = GRITTrainingArguments(output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none")
    GRITTrainer(model=model, grit_adapter=grit_adapter, args=arguments, train_dataset=world.dataset).train()
    assert all(layer.lora_B.any() for layer in grit_adapter.grit_layers.values())


def test_advanced_configuration(world):
    config = ModelGRITConfig(
        vision_config=ModalityConfig(fisher_approximation="kfac", projection_budget=64),
        text_config=ModalityConfig(fisher_approximation="diagonal", projection_budget=32),
    )
    adapter = VLMGRITAdapter(world.model(), config)
    create_grit_optimizer(adapter.get_trainable_parameters(), grit_layers=adapter.grit_layers)
    adapter.model(**world.batch(0, 18)).loss.backward()
    adapter.update_mixed_modal_fisher()
    projections = adapter.get_mixed_modal_projections()
    vision, text = (adapter.grit_layers[getattr(adapter, f"{m}_layers")[0]] for m in ("vision", "text"))
    assert {name: f.shape for name, f in vision.fisher_matrix.kfac_factors.items()} == dict.fromkeys("AG", (16, 16))
    assert text.fisher_matrix.fisher_diagonal.shape == (16 * (32 + 32),)
    # kfac has 16 directions a layer, of 64; what is over goes nowhere, since the text's budget is fixed too.
    assert set(projections["vision"].values()) == {16}
    assert sum(projections["text"].values()) == 32 * len(adapter.text_layers)
