"""Section train: what does not fit together is said, for the section and for an arm; steps are counted as it trains."""

import copy

import pytest
import yaml

from pipelines import profile
from pipelines.check import parse_params
from pipelines.params import ConfigError
from trainers.settings import TrainSettings


@pytest.fixture
def raw():
    raw = yaml.safe_load(profile.compose("tiny"))
    raw["train"] |= {"max_steps": 500, "eval_steps": 125}
    return raw


BOTH = r"expected either max_steps or epochs, got both \(max_steps 500, epochs 2\.0\); set one of them"
CASES = [
    ({"epochs": 2.0}, BOTH),
    ({"max_steps": None}, r"expected either max_steps or epochs, got neither"),
    ({"keep_best": True}, r"keep_best: expected save_steps to be a multiple of eval_steps = 125, got save_steps = 100"),
    ({"early_stopping_patience": 3}, r"early_stopping_patience: expected save_steps .* = 125, got save_steps = 100"),
    ({"early_stopping_min_delta": 0.1}, r"early_stopping_min_delta: 0\.1 has no effect without"),
    ({"devices": 3}, r"batch_size: expected a multiple of devices = 3, which share it, got 16"),
]


@pytest.mark.parametrize(("changes", "message"), CASES)
def test_what_does_not_fit_together(raw, changes, message):
    section, arm = copy.deepcopy(raw), copy.deepcopy(raw)
    section["train"].update(changes)
    arm["arms"]["pure_grit"].update(changes)
    with pytest.raises(ConfigError, match=rf"1 error\n  train: {message}"):  # once, not for every arm again
        parse_params(section)
    with pytest.raises(ConfigError, match=rf"1 error\n  arms\.pure_grit: {message}"):
        parse_params(arm)


def test_packing_is_refused_where_items_would_see_each_other(raw):
    raw["train"]["packing"] = True
    with pytest.raises(ConfigError, match=r"1 error\n  arms\.hybrid_grit: packing: expected false on Unsloth"):
        parse_params(raw)
    raw["arms"]["hybrid_grit"]["packing"] = False
    assert parse_params(raw).train_for("pure_grit").packing


def test_an_arm_may_train_by_epochs(raw):
    raw["arms"]["pure_grit"] |= {"epochs": 3, "max_steps": None}
    params = parse_params(raw)
    for arm, expected in (("pure_grit", (None, 3.0)), ("baseline_lora", (500, None))):
        assert (params.train_for(arm).max_steps, params.train_for(arm).epochs) == expected


def test_early_stopping_keeps_the_best(raw):
    changes = {"early_stopping_patience": 2, "eval_steps": 50}
    assert TrainSettings(**raw["train"] | changes).keeps_best
    assert not TrainSettings(**raw["train"]).keeps_best


def test_steps_are_those_of_the_trainer(raw, tmp_path):
    import torch
    from transformers import Trainer, TrainingArguments

    for items in (1, 7, 64, 65):
        for batch, accumulation, epochs in ((4, 1, 1.0), (4, 3, 1.5), (8, 2, 0.1), (16, 4, 2.0), (3, 5, 0.7)):
            changes = {"max_steps": None, "epochs": epochs, "batch_size": batch, "gradient_accumulation": accumulation}
            args = TrainingArguments(
                str(tmp_path), num_train_epochs=epochs, per_device_train_batch_size=batch, report_to="none",
                gradient_accumulation_steps=accumulation, use_cpu=True,
            )  # fmt: skip
            trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=[{"x": i} for i in range(items)])
            counted = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
            assert TrainSettings(**raw["train"] | changes).steps_for(items) == counted
    assert TrainSettings(**raw["train"]).steps_for(7) == 500
