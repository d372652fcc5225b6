"""`GRITTrainer` on a tiny Idefics3."""

import json
import math

import pytest
import small_vlm
import torch

from grit_vlm import GRITTrainer, GRITTrainingArguments
from grit_vlm.optimizers.natural_gradient import MODES, OptimizerTypeError

ROWS = small_vlm.examples(12)


def trainer(folder, adapter=None, told=None, **arguments):
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_steps": 6,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "seed": 0,
        "disable_tqdm": True, "grit_log_freq": 2, "dataloader_num_workers": 0,
    }  # fmt: skip
    adapter = small_vlm.adapter(fisher_update_freq=2) if adapter is None else adapter
    return GRITTrainer(
        model=adapter.model,
        grit_adapter=adapter,
        args=GRITTrainingArguments(**values | arguments),
        train_dataset=ROWS,
        **(told or {}),
    )


def weights(adapter):
    return [p.detach().clone() for p in adapter.get_trainable_parameters()]


@pytest.mark.parametrize("kind", sorted(MODES))
def test_every_type_trains(tmp_path, kind):
    found = trainer(tmp_path, grit_optimizer_type=kind, learning_rate=1e-3)
    before = weights(found.grit_adapter)
    result = found.train()
    assert result.global_step == 6 and math.isfinite(result.training_loss)
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(found.grit_adapter), strict=True))
    assert found.grit_manager.metrics()["grit/ready_layers"] == 5
    records = [json.loads(line) for line in (tmp_path / "grit_log.jsonl").read_text().splitlines()]
    assert [r["effective"] for r in records if r["kind"] == "effect"] == [True] * 3
    assert records[-1]["kind"] == "final" and set(records[-1]["capture"].values()) == {"hooks"}
    assert found.grit_manager.capture is None  # hooks are off


@pytest.mark.parametrize("estimate", ["kfac", "block_diagonal"])
@pytest.mark.parametrize("schedule", ["linear", "adaptive"])
def test_a_resumed_run_gives_the_same_bytes(tmp_path, estimate, schedule):
    told = {"fisher_approximation": estimate, "enable_projection": True, "projection_budget_start": 2,
            "projection_budget_end": 60, "projection_schedule": schedule, "fisher_update_freq": 2,
            "lora_dropout": 0.1}  # fmt: skip
    whole = trainer(tmp_path / "whole", small_vlm.adapter(**told), max_steps=9, save_strategy="steps", save_steps=4)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert set(state["grit"]["layers"]) == set(whole.grit_manager.by_pair)
    again = trainer(tmp_path / "again", small_vlm.adapter(seed=0, **told), max_steps=9)
    again.train(resume_from_checkpoint=str(checkpoint))
    whole.grit_adapter.save_pretrained(tmp_path / "a")
    again.grit_adapter.save_pretrained(tmp_path / "b")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    budgets = [[layer.projection_budget for layer in t.grit_adapter.grit_layers.values()] for t in (whole, again)]
    assert budgets[0] == budgets[1] and max(budgets[0]) > 2
    logs = [(tmp_path / name / "grit_log.jsonl").read_text().splitlines() for name in ("whole", "again")]
    assert [json.loads(line) for line in logs[0]] == [json.loads(line) for line in logs[1]]


def test_the_best_model_is_loaded(tmp_path):
    """With the state of its step beside it, and where only adapters are saved."""
    for only_model in (False, True):
        found = trainer(
            tmp_path / str(only_model), max_steps=6, learning_rate=0.5, eval_strategy="steps", eval_steps=2,
            save_strategy="steps", save_steps=2, load_best_model_at_end=True, save_only_model=only_model,
            told={"eval_dataset": small_vlm.examples(4, seed=50)},
        )  # fmt: skip
        found.train()
        losses = {e["step"]: e["eval_loss"] for e in found.state.log_history if "eval_loss" in e}
        best = min(losses, key=losses.get)
        assert best < 6  # a rate this high makes it worse
        assert found.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
        if not only_model:
            assert found.grit_manager.step == best
        last = json.loads((tmp_path / str(only_model) / "grit_log.jsonl").read_text().splitlines()[-1])
        assert last["kind"] == "final"


@pytest.mark.parametrize("kind", ["grit_adam", "adaptive_sgd"])
def test_accumulated_micro_batches_are_one_batch(tmp_path, kind):
    """Up to rounding; the tokens counted are exactly as many."""
    found = []
    for size, accumulation in ((2, 1), (1, 2)):
        told = trainer(
            tmp_path / str(size), small_vlm.adapter(double=True, fisher_update_freq=1, fisher_approximation="kfac"),
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=4,
            grit_optimizer_type=kind,
        )  # fmt: skip
        told.train_dataset = [{n: v.double() if v.is_floating_point() else v for n, v in row.items()} for row in ROWS]
        told.train()
        found.append(told.grit_adapter)
    for name, layer in found[0].grit_layers.items():
        other = found[1].grit_layers[name]
        assert layer.fisher_matrix.samples == other.fisher_matrix.samples > 0
        for side in "AG":
            torch.testing.assert_close(
                layer.fisher_matrix.kfac_factors[side], other.fisher_matrix.kfac_factors[side], rtol=1e-6, atol=1e-12
            )
    for one, two in zip(*map(weights, found), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


def test_evaluation_is_not_counted(tmp_path):
    samples = []
    for more in ({}, {"eval_strategy": "steps", "eval_steps": 1, "told": {"eval_dataset": ROWS[:4]}}):
        found = trainer(tmp_path / str(len(more)), **more)
        found.train()
        samples.append([layer.fisher_matrix.samples for layer in found.grit_adapter.grit_layers.values()])
    assert samples[0] == samples[1]
    assert len(found.state.log_history) > 10


def test_schedules_go_over_the_whole_run(tmp_path):
    """Also where the length is given in epochs: 12 rows in batches of 2, twice, are 12 steps."""
    told = {"enable_projection": True, "projection_budget_start": 2, "projection_budget_end": 26,
            "fisher_update_freq": 1}  # fmt: skip
    found = trainer(tmp_path, small_vlm.adapter(**told), max_steps=-1, num_train_epochs=2)
    found.train()
    assert found.grit_manager.total_steps == found.state.max_steps == 12
    assert found.grit_adapter.vision_scheduler.budget() == 26
    assert sum(layer.projection_budget for layer in found.grit_manager.by_pair.values()) == 5 * 24  # at step 11


def test_the_arguments_reach_the_engine(tmp_path):
    found = trainer(
        tmp_path, small_vlm.adapter(enable_projection=True), enable_projection=False, fisher_update_freq=3,
        kl_clip=0.5, eigen_power=0.25, grafting=False, ng_warmup_steps=2, grit_optimizer_type="adaptive_adam",
    )  # fmt: skip
    found.train()
    config = found.grit_manager.config
    assert (config.mode, config.kl_clip, config.eigen_power, config.grafting, config.ng_warmup_steps) == (
        "eigen_adamw", 0.5, 0.25, False, 2)  # fmt: skip
    assert found.grit_manager.adaptive and not found.grit_manager.schedules
    for layer in found.grit_adapter.grit_layers.values():
        assert layer.projection_budget is None and layer.config.fisher_update_freq == 3
    settings = trainer(tmp_path, told={"grit_settings": {"grit_optimizer_type": "grit_sgd", "eigen_power": 0.5}})
    settings.create_optimizer()
    assert settings.grit_manager.config.mode == "sgd" and settings.grit_manager.config.eigen_power == 0.5


def test_adaptive_schedules_hear_the_losses(tmp_path):
    """The mean loss of each step, micro-batches together."""
    heard = []
    adapter = small_vlm.adapter(enable_projection=True, projection_schedule="adaptive")
    found = trainer(tmp_path, adapter, gradient_accumulation_steps=2, max_steps=3)
    observe = found.grit_manager.observe_loss
    found.grit_manager.observe_loss = lambda loss: (heard.append(loss), observe(loss))
    found.train()
    logged = [entry["loss"] for entry in found.state.log_history if "loss" in entry]
    assert heard == pytest.approx(logged, abs=1e-3) and len(heard) == 3


def test_the_documents_spellings(tmp_path):
    adapter = small_vlm.adapter()
    arguments = GRITTrainingArguments(output_dir=str(tmp_path), report_to=[])

    class Tokenizer:
        def save_pretrained(self, folder):
            """Nothing to save."""

    tokenizer = Tokenizer()
    found = GRITTrainer(model=adapter.model, training_args=arguments, tokenizer=tokenizer, grit_adapter=adapter)
    assert found.args is arguments and found.processing_class is tokenizer
    with pytest.raises(ValueError, match="training_args or args, which are the same; got both"):
        GRITTrainer(model=adapter.model, args=arguments, training_args=arguments, grit_adapter=adapter)


def test_which_model_is_trained(tmp_path):
    adapter, other = small_vlm.adapter(), small_vlm.adapter()
    arguments = GRITTrainingArguments(output_dir=str(tmp_path), report_to=[])
    with pytest.raises(ValueError, match="expected the one that grit_adapter was made of"):
        GRITTrainer(model=other.model, args=arguments, grit_adapter=adapter)
    for model in (None, adapter.model, adapter.model.get_base_model()):
        assert GRITTrainer(model=model, args=arguments, grit_adapter=adapter).model is adapter.model
    assert GRITTrainer(adapter.model, arguments, grit_adapter=adapter).model is adapter.model


def test_mistakes_in_arguments(tmp_path):
    with pytest.raises(OptimizerTypeError, match="did you mean 'grit_adam'"):
        GRITTrainingArguments(output_dir=str(tmp_path), grit_optimizer_type="grit_adan")
    with pytest.raises(ValueError, match="fisher_update_freq: expected at least 1"):
        GRITTrainingArguments(output_dir=str(tmp_path), fisher_update_freq=0)
