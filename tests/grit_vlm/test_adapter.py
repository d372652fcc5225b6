"""`VLMGRITAdapter` on a tiny Idefics3: settings of each modality, ordinary PEFT files, a base that stays as it is."""

import json

import pytest
import small_vlm
import torch
from peft import PeftModel

from grit_vlm import (
    GritVlmError,
    ModalityConfig,
    ModelGRITConfig,
    VLMGRITAdapter,
    create_grit_optimizer,
    create_vlm_grit_adapter,
)


def logits(model):
    was = model.training
    model.eval()
    with torch.no_grad():
        found = model(**small_vlm.batch(model, 7)).logits
    model.train(was)
    return found


def train(adapter, steps=3, kind="grit_adam", **settings):
    weights, layers = adapter.get_trainable_parameters(), adapter.get_grit_layers()
    optimizer = create_grit_optimizer(weights, kind, layers, lr=1e-2, **settings)
    adapter.model.train()
    losses = []
    for step in range(steps):
        loss = adapter.model(**small_vlm.batch(adapter.model, step % 2)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def modality_config(**changed):
    return ModelGRITConfig(
        vision=ModalityConfig(small_vlm.VISION, rank=2, alpha=6, dropout=0.3, fisher_approximation="kfac"),
        text=ModalityConfig(small_vlm.TEXT, enable_projection=False),
        cross_modal=ModalityConfig(small_vlm.CROSS, rank=3, enable_natural_gradient=False, projection_budget=7),
        **{"global_rank": 4, "global_alpha": 8.0, "global_dropout": 0.1, **changed},
    )


def test_every_modality_has_its_own_settings():
    adapter = VLMGRITAdapter(small_vlm.base(), modality_config(projection_budget_start=5, projection_budget_end=9))
    assert [len(names) for names in adapter.layers.values()] == [2, 2, 1]
    for names, rank, scale, dropout, estimate, natural, projection, budget in (
        (adapter.vision_layers, 2, 3.0, 0.3, "kfac", True, True, 5),
        (adapter.text_layers, 4, 2.0, 0.1, "diagonal", True, False, None),
        (adapter.cross_modal_layers, 3, 8 / 3, 0.1, "diagonal", False, True, 7),
    ):
        for layer in (adapter.grit_layers[name] for name in names):
            assert layer.lora_A.shape[0] == layer.lora_B.shape[1] == rank and layer.scaling == pytest.approx(scale)
            assert layer.lora_dropout.p == dropout and layer.fisher_matrix.approximation_type == estimate
            assert (layer.config.enable_natural_gradient, layer.config.enable_projection) == (natural, projection)
            assert layer.projection_budget == budget
    assert set(adapter.manager.curvature.schedules) == {"vision", "cross_modal"}
    assert (adapter.vision_scheduler.start, adapter.vision_scheduler.end) == (5, 9)


@pytest.mark.parametrize(
    ("kind", "estimate"),
    [("grit_adam", "kfac"), ("grit_adam_preconditioned", "diagonal"), ("grit_sgd", "kfac")],
)
def test_a_base_in_16_bit(kind, estimate):
    """LoRA in float32 over it, as PEFT does, and LoRA in bfloat16 too: estimates are in float32."""
    for everything in (False, True):
        told = {"fisher_approximation": estimate, "enable_projection": True}
        adapter = small_vlm.adapter(model=small_vlm.base().bfloat16(), **told)
        if everything:
            adapter.model.bfloat16()
        weights = adapter.get_trainable_parameters()
        before = [p.detach().clone() for p in weights]
        assert bool(torch.isfinite(train(adapter, 3, kind)).all())
        assert not all(torch.equal(p, old) for p, old in zip(weights, before, strict=True))
        assert all(bool(torch.isfinite(p).all()) for p in weights)
        for layer in adapter.grit_layers.values():
            assert layer.fisher_matrix.samples and layer.eigenvalues.dtype == torch.float32


def test_files_are_plain_pefts_and_train_on(tmp_path):
    """Ranks and alphas of modalities too: PEFT alone gives the same logits."""
    adapter = VLMGRITAdapter(small_vlm.base(), modality_config())
    assert all("lora_" in name for name, p in adapter.model.named_parameters() if p.requires_grad)
    train(adapter, weight_decay=0.1)
    names = {name.replace(".base_layer", ""): p for name, p in adapter.model.get_base_model().named_parameters()}
    assert all(torch.equal(names[name], p) for name, p in small_vlm.base().named_parameters()), (
        "the base stays as it is"
    )
    adapter.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    theirs = PeftModel.from_pretrained(small_vlm.base(), str(tmp_path))
    assert torch.equal(logits(adapter.model), logits(theirs))
    assert not torch.equal(logits(theirs), logits(small_vlm.base()))

    def saved():
        return PeftModel.from_pretrained(small_vlm.base(), str(tmp_path), is_trainable=True)

    again = VLMGRITAdapter(saved(), modality_config())
    assert torch.equal(logits(adapter.model), logits(again.model))
    assert again.describe() == adapter.describe() and again.layers == adapter.layers
    losses = train(again, 20)
    assert losses[-2:].mean() < losses[:2].mean()
    with pytest.raises(GritVlmError, match="chosen layers, got a difference"):
        VLMGRITAdapter(saved(), small_vlm.settings(), **small_vlm.LAYERS | {"cross_modal_layers": []})
    with pytest.raises(GritVlmError, match="expected rank 4, got 2"):
        VLMGRITAdapter(saved(), small_vlm.settings(), **small_vlm.LAYERS)


def test_from_a_saved_model_and_from_what_cannot_be(tmp_path):
    small_vlm.base().save_pretrained(tmp_path)
    model, adapter = create_vlm_grit_adapter(str(tmp_path), small_vlm.settings(), **small_vlm.LAYERS)
    assert model is adapter.model and len(adapter.grit_layers) == 5
    torch.testing.assert_close(logits(model), logits(small_vlm.base()))
    with pytest.raises(GritVlmError, match="a ModelGRITConfig or model_config_name, got both"):
        VLMGRITAdapter(small_vlm.base(), modality_config(), "smolvlm_fast")
    with pytest.raises(GritVlmError, match="no vision-language model could be loaded from"):
        create_vlm_grit_adapter(str(tmp_path / "nowhere"), small_vlm.settings())
