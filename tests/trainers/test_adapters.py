"""Arms from YAML: optimizers by name and by path, PEFT's methods and initializations."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from export import gguf
from tests.trainers.runs import interrupted
from tests.trainers.test_training import WEIGHTS, weights
from trainers.adapters import TRAINED
from trainers.arms import baseline_lora, pure_grit
from trainers.models import add_lora, load_base_model
from trainers.run import build, run, training_arguments

ARM = baseline_lora.ARM
IDS = torch.arange(3, 43)[None]
LORA_PLUS, LORA_FA = "peft.optimizers.create_loraplus_optimizer", "peft.optimizers.create_lorafa_optimizer"


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def watched(seen, arm=ARM):
    """The arm; `seen` gets the model's logits at the start and after every step, with the adapter and without."""

    def make_trainer(settings, **kwargs):
        trainer = arm.make_trainer(settings, **kwargs)
        model = trainer.model

        def look(when):
            seen[when] = logits(model)
            with model.disable_adapter():
                seen["off"] = logits(model)
            model.train()

        class Look(TrainerCallback):
            def on_train_begin(self, *_, **__):
                look("start")

            def on_step_end(self, *_, **__):
                look("end")

        trainer.add_callback(Look())
        return trainer

    return replace(arm, make_trainer=make_trainer)


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "lora_ga", "eva"])
def test_an_adapter_with_a_start_fits_the_untouched_base(make_job, start):
    """Whatever PEFT takes off the base's weights while it trains, and the base answers as ever with the adapter off."""
    job, seen = make_job(max_steps=4, peft={"init_lora_weights": start, "use_rslora": start == "pissa"}), {}
    said = run(watched(seen), job)
    base = AutoModelForCausalLM.from_pretrained(job.base.location, dtype=torch.float32)
    plain = logits(base)
    adapted = PeftModel.from_pretrained(base, str(job.output))
    loaded = logits(adapted)
    for one, other in ((seen["start"], plain), (seen["off"], plain), (loaded, seen["end"])):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert (loaded - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(adapted.merge_and_unload()), seen["end"], rtol=0, atol=1e-4)
    saved = sum(w.numel() for w in load_file(job.output / WEIGHTS).values())
    assert said["trainable_parameters"] == (saved if start == "eva" else saved / 2)
    assert gguf.losses(job.output) == []


def test_a_start_is_gone_on_from_to_the_same_bits(make_job, tmp_path):
    settings = {"max_steps": 8, "peft": {"init_lora_weights": "pissa"}}
    undisturbed, job = make_job(**settings), make_job(**settings, checkpoints=tmp_path / "checkpoints")
    run(ARM, undisturbed)
    interrupted("baseline_lora", job, {}, "on_step_end", 6)
    assert run(ARM, job)["resumed_from_step"] == 4
    assert weights(job) == weights(undisturbed)


def test_every_method_that_is_trained_here_can_be_merged(make_job, tmp_path):
    needs = {"VBLORA": {"vector_length": 16}, "C3A": {"block_size": 16}}
    said = {}
    for method in TRAINED:
        job = make_job(peft={"peft_type": method, **needs.get(method, {})})
        model = add_lora(load_base_model(job.base, job.settings), job.settings)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        folder, merged = tmp_path / method, tmp_path / f"{method}.merged"
        model.save_pretrained(folder)
        gguf.save_merged(job.base.location, folder, merged, {})
        base = AutoModelForCausalLM.from_pretrained(job.base.location, dtype=torch.float16).float()
        plain = logits(base)
        adapted = logits(PeftModel.from_pretrained(base, str(folder)))
        found = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
        said[method] = float((found - adapted).abs().max() / (adapted - plain).abs().max())
        assert (gguf.losses(folder) == []) == (method == "LORA")
    assert max(said.values()) < 0.05, said


# Optimizers


def test_an_optimizer_of_transformers_gets_its_arguments(make_job):
    def groups(arm=ARM, **settings):
        trainer = build(arm, make_job(**settings))[0]
        return type(trainer.create_optimizer()).__name__, trainer.optimizer.param_groups[0]

    name, group = groups(optimizer="lion_32bit", optim_args={"betas": [0.95, 0.98]})
    assert (name, tuple(group["betas"])) == ("Lion", (0.95, 0.98))
    name, group = groups(optim_args={"betas": [0.8, 0.95], "eps": 1e-6})
    assert (name, tuple(group["betas"]), group["eps"]) == ("AdamW", (0.8, 0.95), 1e-6)
    name, group = groups(pure_grit.ARM, grit={}, optim_args={"betas": [0.8, 0.95]})
    assert (name, tuple(group["betas"])) == ("GritOptimizer", (0.8, 0.95))


def test_an_optimizer_by_its_path_gets_its_arguments(make_job):
    def made(optimizer, **own):
        return build(ARM, make_job(optimizer=optimizer, weight_decay=0.1, optim_args=own))[0].create_optimizer()

    group = made("torch.optim.Muon", momentum=0.8).param_groups[0]
    assert (group["momentum"], group["lr"], group["weight_decay"], len(group["params"])) == (0.8, 0.01, 0.1, 12)
    a, *_, b, _ = made(LORA_PLUS, loraplus_lr_ratio=4, betas=[0.8, 0.999]).param_groups
    assert (a["lr"], b["lr"], b["betas"]) == (0.01, 0.04, (0.8, 0.999))
    group = made(LORA_FA).param_groups[0]
    assert (group["scaling_factor"], group["weight_decay"], group["params"][0].requires_grad) == (2.0, 0.1, False)
    preconditioned = made("peft.optimizers.create_riemannian_optimizer", reg=0.1)
    assert isinstance(preconditioned, torch.optim.AdamW) and preconditioned.param_groups[0]["weight_decay"] == 0.1


def test_of_several_gpus_one_is_taken_and_said(make_job, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    args = training_arguments(make_job(batch_size=4), use_cpu=False)
    assert (args.n_gpu, args.train_batch_size) == (1, 4)
    assert capsys.readouterr().out.startswith("8 GPUs are visible")
