"""Section train: what does not fit together is said, for the section and for an arm; steps are counted as it trains."""

import pytest
import yaml

from pipelines import profile
from pipelines.check import parse_params
from pipelines.params import ConfigError
from trainers.settings import TrainSettings


@pytest.fixture(scope="module")
def composed():
    return profile.compose("tiny")


@pytest.fixture
def raw(composed):
    raw = yaml.safe_load(composed)
    raw["train"] |= {"max_steps": 500, "eval_steps": 125}
    return raw


LORA, GRIT = "baseline_lora", "pure_grit"
LORA_PLUS, LORA_FA = "peft.optimizers.create_loraplus_optimizer", "peft.optimizers.create_lorafa_optimizer"
REFUSED = [
    (LORA, {"epochs": 2.0}, r"max_steps 500, epochs 2\.0"),
    (LORA, {"max_steps": None}, r"expected either max_steps or epochs"),
    (LORA, {"keep_best": True}, r"keep_best: .*125, got save_steps = 100"),
    (LORA, {"early_stopping_patience": 3}, r"early_stopping_patience: .*125, got save_steps = 100"),
    (LORA, {"early_stopping_min_delta": 0.1}, r"early_stopping_min_delta: 0\.1"),
    (LORA, {"target_modules": ["q_proj", "lm_head"]}, r"target_modules: .*got lm_head"),
    (LORA, {"devices": 3}, r"batch_size: .*devices = 3.*got 16"),
    ("hybrid_grit", {"packing": True}, r"packing: expected false"),
    (LORA, {"replay": 1.0}, r"replay: .*less than 1"),
    (LORA, {"scale_update": 0.0}, r"scale_update: .*greater than 0"),
    (LORA, {"start": "corda"}, r"start: unknown key"),
    ("residual_lora", {"start": "pissa"}, r"start: .*'corda' or 'lora_null'"),
    ("residual_lora", {"preserve": {"method": "kfac"}}, r"preserve\.method: .*got kfac"),
    # preserve
    (LORA, {"preserve": {"strength": -1.0}}, r"strength: .*greater than or equal to 0"),
    (LORA, {"preserve": {"kl": 0.1}}, r"kl: 0\.1 .*method none"),
    (LORA, {"preserve": {"method": "distil"}}, r"method: .*'distill'"),
    # Optimizers
    (LORA, {"optimizer": "lion_32bits"}, r"optimizer: .*'lion_32bits'; did you mean 'lion_32bit'\?"),
    (LORA, {"optimizer": "galore_adamw"}, r"galore_adamw .*galore_torch"),
    (LORA, {"optimizer": "not_there.Lion"}, r"module not_there"),
    (LORA, {"optimizer": "torch.optim.Lion"}, r"no attribute 'Lion'"),
    (LORA, {"optimizer": "torch.nn.Linear"}, r"optimizer: torch\.nn\.Linear"),
    (LORA, {"optimizer": LORA_PLUS}, r"missing 1 required .*'loraplus_lr_ratio'"),
    (LORA, {"optimizer": LORA_PLUS, "optim_args": {"loraplus_lr_ratio": 4, "x": 1}}, r"unexpected .* 'x'"),
    (LORA, {"optimizer": "torch.optim.Muon", "optim_args": {"beta": 0}}, r"optim_args\.beta: unknown key of torch"),
    (LORA, {"optimizer": LORA_FA, "optim_args": {"r": 4}}, r"optim_args\.r: .*rank"),
    (LORA, {"optim_args": {"beta": 0.9}}, r"optim_args\.beta: .*did you mean 'betas'"),
    (LORA, {"optim_args": {"lr": 0.9}}, r"optim_args\.lr: .*learning_rate"),
    (LORA, {"optim_args": {"betas": [2, 0.9]}}, r"optim_args: adamw_torch .*Invalid beta"),
    (GRIT, {"grit": {"lora_rank": 8, "model_id": "x"}}, r"grit: lora_rank, model_id: has no effect here"),
    (GRIT, {"optimizer": "torch.optim.Muon"}, r"optimizer: .*adamw_torch"),
    (GRIT, {"optim_args": {"amsgrad": True}}, r"optim_args: .*got amsgrad"),
    # PEFT
    ("hybrid_grit", {"peft": {"use_dora": True}}, r"peft: .*use_rslora"),
    ("unsloth_lora", {"peft": {"use_dora": True}}, r"peft: .*use_rslora"),
    (LORA, {"peft": {"use_dore": True}}, r"peft\.use_dore: .*did you mean 'use_dora'\?"),
    (LORA, {"peft": {"r": 8}}, r"peft\.r: expected 16, .*got 8"),
    (LORA, {"peft": {"init_lora_weights": "piss"}}, r"'piss'; did you mean 'pissa'\?"),
    (LORA, {"peft": {"peft_type": "VERRA"}}, r"peft\.peft_type: .*'VERRA'; did you mean 'VERA'"),
    (LORA, {"peft": {"peft_type": "ADALORA"}}, r"ADALORA .*penalty"),
    (LORA, {"peft": {"peft_type": "PREFIX_TUNING"}}, r"PREFIX_TUNING .*merge"),
    (LORA, {"peft": {"peft_type": "IA3"}, "dropout": 0.1}, r"dropout: expected 0\.0, .*IA3"),
    (LORA, {"peft": {"use_dora": True}, "scale_update": 0.5}, r"scale_update: expected 1\.0"),
    (LORA, {"peft": {"use_dora": True, "init_lora_weights": "pissa"}}, r"use_dora: .*pissa"),
    (
        LORA,
        {"peft": {"init_lora_weights": "olora"}, "quantize_base": "nf4", "preserve": {"method": "kfac"}},
        r"preserve\.method: .*got kfac(.|\n)*quantize_base: none",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arm", "changes", "message"), REFUSED)
def test_what_an_arm_cannot_be(raw, arm, changes, message):
    raw["arms"][arm] = {**raw["arms"].get(arm, {}), "optim_args": {}, **changes}
    raw["matrix"]["arms"] = [arm]
    with pytest.raises(ConfigError, match=rf"arms\.{arm}(.|\n)*{message}"):
        parse_params(raw)


def test_what_is_wrong_in_section_train_is_said_once_and_not_for_every_arm(raw):
    raw["train"]["epochs"] = 2.0
    with pytest.raises(ConfigError, match=r"1 error\n  train: "):
        parse_params(raw)


def test_text_arms_refuse_pictures():
    raw = yaml.safe_load(profile.compose("vision"))
    raw["train"]["replay"] = 0.2
    raw["arms"]["corda"] = {"variant_of": "residual_lora"}
    raw["matrix"]["arms"].append("corda")
    with pytest.raises(ConfigError, match=r"replay: expected 0"):
        parse_params(raw)
    del raw["train"]["replay"]
    with pytest.raises(ConfigError, match=r"arms\.corda: layers: expected null"):
        parse_params(raw)


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
