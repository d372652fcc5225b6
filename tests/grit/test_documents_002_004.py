"""Names and calls of documents 002 and 004; docs/source_documents.md lists what is different, and why."""

import pytest
import torch
from transformers import Trainer

import grit
from grit import GRITCallback, GRITConfig, GRITManager
from tests.grit.nets import of_kind
from tests.grit.test_grit_trainer import arguments, settings, tiny_data, tiny_model


def test_every_name_is_where_the_documents_have_it():
    from grit import config, manager, trainer

    assert (config.GRITConfig, manager.GRITManager) == (grit.GRITConfig, grit.GRITManager)
    assert trainer.GRITTrainer is grit.GRITTrainer is grit.GritTrainer
    assert grit.GRITOptimizer is grit.GritOptimizer and grit.GRITCallback is grit.GritCallback
    for method in ("update_and_invert_factors", "precondition_gradients", "neural_reprojection"):
        assert callable(getattr(GRITManager, method))


def test_the_configuration_of_document_004_and_the_overrides_of_document_002():
    config = GRITConfig(
        model_id="unsloth/llama-3-8b-bnb-4bit", max_seq_length=2048, batch_size=2, gradient_accumulation_steps=4,
        num_epochs=1, max_steps=60, learning_rate=2e-4, precision="bf16", lora_rank=16, lora_alpha=32, min_lora_rank=8,
        kfac_update_freq=150, kfac_min_samples=64, kfac_damping=1e-4, reprojection_freq=300, log_top_eigs=8,
        use_two_sided_reprojection=True, enable_rank_adaptation=False, rank_adaptation_threshold=0.99,
    )  # fmt: skip
    config.dataset_name, config.kfac_inversion_device, config.log_eigs_bar = "tatsu-lab/alpaca", "cpu", True
    config.validate()
    assert config.training_arguments(seed=3407) == {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 1, "max_steps": 60,
        "learning_rate": 2e-4, "bf16": True, "seed": 3407,
    }  # fmt: skip


def adapted(callback, model, folder, **changes):
    trainer = Trainer(model=model, args=arguments(folder, **changes), train_dataset=tiny_data(8), callbacks=callback)
    trainer.train()
    return [p.detach().clone() for p in model.parameters() if p.requires_grad], trainer


def test_a_callback_added_to_a_plain_trainer_really_preconditions(tmp_path):
    model = tiny_model()
    manager = GRITManager(model, settings())
    weights, trainer = adapted([GRITCallback(manager, manager.config)], model, tmp_path / "grit")
    plain, _ = adapted([], tiny_model(), tmp_path / "plain")
    assert manager.applied_steps == trainer.state.global_step > 0 and of_kind(manager.history, "final")
    assert not any(torch.equal(one, other) for one, other in zip(weights, plain, strict=True))


def test_a_callback_that_would_have_no_effect_is_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="config: expected the manager's own"):
        GRITCallback(GRITManager(model, settings()), settings(log_freq=3))
    callback = GRITCallback(GRITManager(model, settings()))
    state = type("State", (), {"global_step": 0})
    args = arguments(tmp_path)
    with pytest.raises(grit.GRITError, match="nothing would be preconditioned"):
        callback.on_train_begin(args, state, None, optimizer=torch.optim.AdamW(model.parameters()))
    state.global_step = 4
    with pytest.raises(grit.GRITError, match="cannot resume"):
        callback.on_train_begin(args, state, None, optimizer=torch.optim.AdamW(model.parameters()))


def test_final_ranks_and_pictures_reach_a_tracker(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = tiny_model()
    config = settings(log_eigs_bar=True, log_eig_heatmaps=True, reprojection="balanced")
    trainer = grit.GRITTrainer(
        model=model, grit_config=config, train_dataset=tiny_data(8),
        args=arguments(tmp_path, report_to=["tensorboard"]),
    )  # fmt: skip
    trainer.train()
    folder = next((tmp_path).rglob("events.out.tfevents*")).parent
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    layers = len(trainer.grit_manager.pairs())
    for name in ("base_r", "r", "final_k_a", "final_k_b"):
        assert sum(tag.startswith("Fisher/") and tag.endswith(f"/{name}") for tag in events.Tags()["scalars"]) == layers
    assert set(events.Tags()["images"]) == {"grit/spectra", "grit/eigenvalues", "grit/factors"}
