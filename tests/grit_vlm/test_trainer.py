"""`GRITTrainer` on a tiny Idefics3."""

import json

import pytest
import small_vlm
import torch

from grit_vlm import GRITTrainer, GRITTrainingArguments, create_grit_optimizer

ROWS = small_vlm.examples(12)


def trainer(folder, adapter=None, told=None, **arguments):
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_steps": 6,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "seed": 0,
        "disable_tqdm": True, "dataloader_num_workers": 0,
    }  # fmt: skip
    adapter = small_vlm.adapter(fisher_update_freq=2) if adapter is None else adapter
    adapter.manager.config.log_freq = 2
    return GRITTrainer(
        model=adapter.model,
        grit_adapter=adapter,
        args=GRITTrainingArguments(**values | arguments),
        train_dataset=ROWS,
        **(told or {}),
    )


def weights(adapter):
    return [p.detach().clone() for p in adapter.get_trainable_parameters()]


def test_a_resumed_run_gives_the_same_bytes(tmp_path):
    told = {"enable_projection": True, "projection_budget_start": 2, "projection_budget_end": 60,
            "projection_schedule": "cosine", "fisher_update_freq": 2, "lora_dropout": 0.1}  # fmt: skip
    whole = trainer(tmp_path / "whole", small_vlm.adapter(**told), max_steps=7, save_strategy="steps", save_steps=4)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert set(state["grit"]["curvature"]["layers"]) == set(whole.grit_manager.curvature.by_pair)
    again = trainer(tmp_path / "again", small_vlm.adapter(**told), max_steps=7)
    again.train(resume_from_checkpoint=str(checkpoint))
    whole.grit_adapter.save_pretrained(tmp_path / "a")
    again.grit_adapter.save_pretrained(tmp_path / "b")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    budgets = [[layer.projection_budget for layer in t.grit_adapter.grit_layers.values()] for t in (whole, again)]
    assert budgets[0] == budgets[1] and max(budgets[0]) > 2
    logs = [(tmp_path / name / "grit_log.jsonl").read_text().splitlines() for name in ("whole", "again")]
    records = [json.loads(line) for line in logs[0]]
    assert records == [json.loads(line) for line in logs[1]]
    assert {r["effective"] for r in records if r["kind"] == "effect"} == {True}
    assert records[-1]["kind"] == "final" and set(records[-1]["capture"].values()) == {"hooks"}
    assert (
        whole.grit_manager.metrics()["grit/ready_layers"] == 5 and whole.grit_manager.capture is None
    )  # hooks are off


def test_schedules_go_over_the_whole_run(tmp_path):
    """Also where the length is given in epochs: 12 rows in batches of 2, twice, are 12 steps."""
    told = {"enable_projection": True, "projection_budget_start": 2, "projection_budget_end": 26}
    adapter = small_vlm.adapter(**told, fisher_update_freq=1)
    found = trainer(tmp_path, adapter, max_steps=-1, num_train_epochs=2)
    found.train()
    assert found.grit_manager.curvature.total_steps == found.state.max_steps == 12
    assert found.grit_adapter.vision_scheduler.budget(12) == 26
    budgets = [layer.projection_budget for layer in found.grit_manager.curvature.by_pair.values()]
    assert sum(budgets) == 5 * 24  # at step 11


def test_the_arguments_reach_the_engine(tmp_path):
    more = {"grit_optimizer_type": "grit_adam_preconditioned", "enable_projection": False, "fisher_update_freq": 3}
    found = trainer(tmp_path, small_vlm.adapter(enable_projection=True), **more)
    found.create_optimizer()
    assert found.grit_manager.config.mode == "adamw" and not found.grit_manager.curvature.schedules
    for layer in found.grit_adapter.grit_layers.values():
        assert layer.projection_budget is None and layer.config.fisher_update_freq == 3


def test_spellings_mistakes_and_which_model_is_trained(tmp_path):
    adapter, arguments = small_vlm.adapter(), GRITTrainingArguments(output_dir=str(tmp_path), report_to=[])
    with pytest.raises(ValueError, match="fisher_update_freq: expected at least 1"):
        GRITTrainingArguments(output_dir=str(tmp_path), fisher_update_freq=0)
    tokenizer = type("Tokenizer", (), {"save_pretrained": lambda self, folder: None})()
    found = GRITTrainer(model=adapter.model, training_args=arguments, tokenizer=tokenizer, grit_adapter=adapter)
    assert found.args is found.grit_args is arguments and found.processing_class is tokenizer
    for more in ({"args": arguments, "training_args": arguments}, {"tokenizer": 1, "processing_class": 2}):
        with pytest.raises(ValueError, match="which are the same; got both"):
            GRITTrainer(model=adapter.model, grit_adapter=adapter, **more)
    for model in (None, adapter.model, adapter.model.get_base_model()):
        assert GRITTrainer(model, arguments, grit_adapter=adapter).model is adapter.model
    with pytest.raises(ValueError, match="expected the model of grit_adapter"):
        GRITTrainer(model=small_vlm.adapter().model, args=arguments, grit_adapter=adapter)


def test_a_ready_optimizer_is_clipped_and_told_the_steps(tmp_path):
    adapter = small_vlm.adapter(enable_projection=True)
    ready = create_grit_optimizer(adapter.get_trainable_parameters(), "grit_sgd", adapter.get_grit_layers(), lr=1.0)
    before = weights(adapter)
    told = {"max_steps": 2, "max_grad_norm": 1e-9, "fisher_update_freq": 7}
    trainer(tmp_path, adapter, {"optimizers": (ready, None)}, **told).train()
    assert adapter.manager.curvature.total_steps == 2
    assert all(layer.fisher_matrix.update_freq == 7 for layer in adapter.grit_layers.values())
    assert 0 < max((now - old).norm() for now, old in zip(weights(adapter), before, strict=True)) < 1e-8
