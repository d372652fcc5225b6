"""Document 000 from the vision-language models on; see `mended` for what it gets wrong."""

import document_world
import pytest
import torch
from mended import mended

from grit_vlm import (
    GRITLoRAConfig,
    GRITLoRALayer,
    GRITTrainer,
    GRITTrainingArguments,
    MultiModalProjector,
    VLMGRITAdapter,
    create_grit_optimizer,
    create_linear_scheduler,
    create_vlm_grit_adapter,
)
from grit_vlm.optimizers.natural_gradient import FisherOptimizer
from grit_vlm.utils.projection import effective_rank, recommended_budget


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return document_world.build(tmp_path_factory.mktemp("world"))


# "VLM-Specific Parts"


@mended(
    'self.vision_layers = ["model.vision_model.encoder.layers.*.self_attn.q_proj", …]',
    "adapter.vision_layers",
    "What is adapted are modules, so the attribute has their names; patterns are those of `adapter.model_config`.",
)
def test_the_adapters_attributes(world):
    adapter = VLMGRITAdapter(world.model(), GRITLoRAConfig(projection_budget_start=8, projection_budget_end=16))
    stem = "model.vision_model.encoder.layers"
    projections = ("k_proj", "v_proj", "q_proj", "out_proj")
    assert adapter.vision_layers == [f"{stem}.{i}.self_attn.{p}" for i in range(12) for p in projections]
    assert len(adapter.text_layers) == 30 * 4
    assert list(adapter.grit_layers) == [*adapter.vision_layers, *adapter.text_layers, *adapter.cross_modal_layers]
    assert all(isinstance(layer, GRITLoRALayer) for layer in adapter.grit_layers.values())
    assert isinstance(adapter.multimodal_projector, MultiModalProjector)
    schedule = create_linear_scheduler(8, 16, adapter.manager.total_steps)
    for own in (adapter.vision_scheduler, adapter.text_scheduler):
        assert [own.budget(t) for t in (0, 500, 1000)] == [schedule.budget(t) for t in (0, 500, 1000)] == [8, 12, 16]


@mended(
    "vision_embed_tokens.img_processor.vision_model.encoder.layers.*.self_attn.q_proj",
    "patterns_of(phi, 'vision')",
    "Phi-3.5-vision's modules stand below `model.`.",
)
def test_the_patterns_of_phi(model_of):
    from grit_vlm.config.families import adaptable, patterns_of
    from grit_vlm.config.selection import match

    phi = model_of("phi3_v")
    names, _ = adaptable(phi)
    written = "vision_embed_tokens.img_processor.vision_model.encoder.layers.*.self_attn.q_proj"
    assert not match(written, names)
    assert patterns_of(phi, "vision")[0] == f"model.{written}"
    assert len(match(f"model.{written}", names)) == 11  # no gradient reaches the last of the 12 blocks


def trained_once(world, **settings):
    """Model and adapter after one backward pass."""
    config = GRITLoRAConfig(r=4, fisher_min_samples=8, enable_projection=True, **settings)
    model, grit_adapter = create_vlm_grit_adapter(world.model(), config, model_config_name="smolvlm_fast")
    grit_adapter.manager.open()
    model(**world.batch()).loss.backward()
    return model, grit_adapter


def test_mixed_modal_fisher_and_projections(world):
    _, adapter = trained_once(world, projection_budget_start=5, projection_budget_end=5)
    vision, text, cross = torch.randn(3, 32), torch.randn(4, 32), torch.randn(2, 32)
    changed = adapter.update_mixed_modal_fisher(
        vision_activations=vision, text_activations=text, cross_activations=cross
    )
    assert changed == {"vision": 3, "text": 4, "cross_modal": 1}
    assert torch.equal(adapter.vision_activations[-1], vision) and torch.equal(adapter.text_activations[-1], text)
    assert torch.equal(adapter.cross_activations[-1], cross)
    projections = adapter.get_mixed_modal_projections()
    assert {m: sum(layers.values()) for m, layers in projections.items()} == {
        "vision": 15, "text": 20, "cross_modal": 5,
    }  # fmt: skip
    for modality, layers in projections.items():
        assert list(layers) == adapter.layers[modality] and min(layers.values()) >= 1


@mended(
    "self.multimodal_projector.compute_mixed_modal_projection(vision_fisher, text_fisher, cross_fisher, k_vision, "
    "k_text, k_cross)",
    "projector.compute_mixed_modal_projection(vision_fishers, text_fishers, cross_fishers, 4, 3, 9)",
    "Takes the Fisher information of every layer of a modality, and gives the directions that each keeps.",
)
def test_the_multimodal_projector():
    projector = MultiModalProjector()
    vision_fishers = [torch.tensor([9.0, 8.0, 7.0]), torch.tensor([1.0, 0.5, 0.1])]
    text_fishers, cross_fishers = torch.tensor([5.0, 4.0, 3.0, 2.0]), [torch.tensor([1.0, 1.0])]
    found = projector.compute_mixed_modal_projection(vision_fishers, text_fishers, cross_fishers, 4, 3, 9)
    # What the two cross-modal directions leave of the budget of 9 goes to the others.
    assert found == {"vision": [3, 3], "text": [4], "cross_modal": [2]}
    alone = projector.compute_mixed_modal_projection(vision_fishers, text_fishers, cross_fishers, 4, 3, 1)
    assert alone == {"vision": [3, 1], "text": [3], "cross_modal": [1]}


# "Training Integration"


@mended(
    "GRITTrainer(model, grit_adapter, training_args, ...)",
    "GRITTrainer(model, grit_adapter=grit_adapter, training_args=arguments, train_dataset=world.dataset)",
    "What comes second is `args`, as in transformers' Trainer, so adapter and arguments are given by name.",
)
@mended(
    "training_step: update_mixed_modal_fisher(...), then get_mixed_modal_projections()",
    "trainer.train()",
    "Both happen inside the optimizer's step: a backward pass may be one of several, and its gradients still scaled.",
)
def test_the_trainers_methods(world, tmp_path):
    model, grit_adapter = create_vlm_grit_adapter(
        world.model(), GRITLoRAConfig(r=4, enable_projection=True), model_config_name="smolvlm_fast"
    )
    arguments = GRITTrainingArguments(
        output_dir=str(tmp_path), grit_optimizer_type="grit_adam", fisher_update_freq=3, enable_projection=True,
        use_cpu=True, max_steps=2, report_to="none",
    )  # fmt: skip
    trainer = GRITTrainer(model, grit_adapter=grit_adapter, training_args=arguments, train_dataset=world.dataset)
    assert trainer.grit_adapter is grit_adapter and trainer.grit_args is arguments
    assert trainer.state.global_step % trainer.grit_args.fisher_update_freq == 0
    layers = grit_adapter.get_grit_layers().values()
    seen = []

    def training_step(model, inputs, num_items_in_batch=None):
        seen.append([layer.fisher_matrix.samples for layer in layers])
        loss = type(trainer).training_step(trainer, model, inputs, num_items_in_batch)
        assert 4 < float(loss) < 8  # about the logarithm of 301 pieces
        assert [layer.fisher_matrix.samples for layer in layers] == seen[-1]  # not yet
        return loss

    trainer.training_step = training_step
    trainer.train()
    assert seen[0] == [0] * 8 and min(seen[1]) > 8
    assert isinstance(trainer.create_optimizer().optimizer, FisherOptimizer)
    for layer in layers:
        assert layer.projection_budget >= 1 and layer.config.fisher_update_freq == 3 and layer.lora_B.any()


def test_the_optimizer_as_the_trainer_makes_it(world):
    _, grit_adapter = trained_once(world)
    optimizer = create_grit_optimizer(
        grit_adapter.get_trainable_parameters(),
        optimizer_type=GRITTrainingArguments(use_cpu=True).grit_optimizer_type,
        grit_layers=grit_adapter.get_grit_layers(),
    )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(w) for layer in grit_adapter.grit_layers.values() for w in (layer.lora_A, layer.lora_B)}
    optimizer.step()
    assert all(layer.lora_B.any() for layer in grit_adapter.grit_layers.values())


# "The Complete Training Flow"


@mended(
    'create_vlm_grit_adapter("microsoft/Phi-3.5-vision-instruct", config)',
    "create_vlm_grit_adapter(world.folder, config)",
    "Without a network a folder stands for the hub id, here an Idefics3; the code of Phi-3.5-vision lies on the hub, "
    "and wants `trust_remote_code=True`.",
)
@mended(
    "GRITLoRAConfig(projection_budget_start=32, projection_budget_end=96)",
    "GRITLoRAConfig(r=16, fisher_approximation='diagonal', enable_natural_gradient=True, projection_budget_start=32, "
    "projection_budget_end=96, enable_projection=True)",
    "Budgets have an effect with `enable_projection` only, which is off by default.",
)
@mended("model(batch)", "model(**batch)", "Models of transformers take a batch's tensors by name.")
@mended(
    "compute_loss(outputs, batch.labels)",
    "model.get_base_model().loss_function(outputs.logits, batch.labels, outputs.logits.shape[-1])",
    "The model's own loss, which `outputs.loss` is already.",
)
@mended(
    "optimizer",
    "create_grit_optimizer(grit_adapter.get_trainable_parameters(), grit_layers=grit_adapter.get_grit_layers(), "
    "lr=0.01, total_steps=len(dataloader))",
    "The document's loop has one without making it.",
)
def test_the_training_loop(world):
    config = GRITLoRAConfig(
        r=16,
        fisher_approximation="diagonal",
        enable_natural_gradient=True,
        projection_budget_start=32,
        projection_budget_end=96,
        enable_projection=True,
    )
    model, grit_adapter = create_vlm_grit_adapter(world.folder, config)
    dataloader = [world.batch(0, 18)] * 6  # 72 image tokens: estimates want 64
    optimizer = create_grit_optimizer(
        grit_adapter.get_trainable_parameters(), grit_layers=grit_adapter.get_grit_layers(), lr=0.01,
        total_steps=len(dataloader),
    )  # fmt: skip
    losses, budgets = [], []
    for step, batch in enumerate(dataloader):
        outputs = model(**batch)
        loss = model.get_base_model().loss_function(outputs.logits, batch.labels, outputs.logits.shape[-1])
        torch.testing.assert_close(loss, outputs.loss)
        loss.backward()
        if step % config.fisher_update_freq == 0:
            grit_adapter.update_mixed_modal_fisher()
            projections = grit_adapter.get_mixed_modal_projections()
            assert sum(projections["vision"].values()) == 32 * len(grit_adapter.vision_layers)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        budgets.append(grit_adapter.vision_scheduler.budget(grit_adapter.manager.step))
    assert losses[-1] < losses[0] - 0.1
    assert budgets == [43, 53, 64, 75, 85, 96]


# "Key Innovations"


@mended(
    "vision_fisher = estimate_fisher(vision_gradients, vision_activations)",
    "grit_adapter.update_mixed_modal_fisher()",
    "Hooks have both; one call is for all modalities.",
)
@mended(
    "coordinate_projections(vision_fisher, text_fisher, cross_fisher)",
    "grit_adapter.get_mixed_modal_projections()",
    "One call for all modalities.",
)
@mended(
    "optimal_k = 1.2 * estimate_vision_rank()",
    "recommended_budget(grit_adapter.vision_activations[-1])",
    "A whole number; the rank is the effective one, for activations with noise have full rank.",
)
def test_fisher_and_projections_of_each_modality(world):
    _, grit_adapter = trained_once(world, projection_budget_start=32, projection_budget_end=96)
    grit_adapter.update_mixed_modal_fisher()
    for modality in ("vision", "text", "cross_modal"):
        for name in grit_adapter.layers[modality]:
            assert grit_adapter.grit_layers[name].fisher_matrix.fisher_diagonal.sum() > 0
    assert set(grit_adapter.get_mixed_modal_projections()) == {"vision", "text", "cross_modal"}
    rank = grit_adapter.estimate_vision_rank()
    assert 1 < rank < 32 and rank == effective_rank(grit_adapter.manager.vision_inputs)
    grit_adapter.update_mixed_modal_fisher(vision_activations=torch.randn(2, 40, 12))
    rank = grit_adapter.estimate_vision_rank()
    assert 8 < rank < 12 and rank == effective_rank(grit_adapter.vision_activations[-1])
    optimal_k = recommended_budget(grit_adapter.vision_activations[-1])
    assert optimal_k == round(1.2 * rank)


def test_the_trainer_as_written(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without arguments it writes to grit_output
    model, grit_adapter = create_vlm_grit_adapter(world.model(), GRITLoRAConfig(r=2), model_config_name="smolvlm_fast")
    dataset, eval_dataset, tokenizer = world.dataset[:12], world.dataset[12:], world.processor.tokenizer
    trainer = GRITTrainer(
        model=model,
        grit_adapter=grit_adapter,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        tokenizer=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.state.global_step == 6 and grit_adapter.manager.applied_steps == 6  # 3 epochs of 2 batches
    assert trainer.evaluate()["eval_loss"] < before
    assert trainer.processing_class is tokenizer
    assert (tmp_path / "grit_output" / "grit_log.jsonl").is_file()
