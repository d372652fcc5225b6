"""The probe on Trainers: a ledger file, the same after a kill and a resume as without one."""

import json
import logging
import os
import shutil
from functools import partial

import pytest
import torch
from transformers import Trainer, TrainingArguments

from grit import GRITConfig, GRITManager, GritTrainer
from probes import Evidence, Probe, ProbeCallback, judge
from probes.callback import load, save
from tests.probes.notebook import NotebookKFAC
from tests.probes.worlds import BATCH, at, example, tiny_llama, weights_of

STEPS, SAVE, KILLED, EVERY = 12, 4, 6, 3


def killed(kind, folder):
    trainer, _ = prepare(kind, folder)
    left = iter(range(KILLED))  # steps; the next one raises StopIteration
    trainer.add_callback(at("on_step_begin", lambda: next(left)))
    with pytest.raises(StopIteration):
        trainer.train()


def items():
    generator = torch.Generator().manual_seed(3)
    return [example(generator, padded=i % 2 == 0) for i in range(32)]


def arguments(folder, **changes):
    values = dict(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=1e-2,
        save_steps=SAVE, report_to="none", disable_tqdm=True, use_cpu=True, max_grad_norm=0.5,
    )  # fmt: skip
    return TrainingArguments(**{**values, **changes})


def prepare(kind, folder, probed=True, **changes):
    """Model, trainer and probe afresh, as a new process would; dropout shows whether random numbers are the same."""
    model = tiny_llama(0, lora_dropout=0.1)
    told, kwargs, cls = {}, {}, Trainer
    if kind == "notebook":
        kfac = NotebookKFAC(model)
        kwargs["callbacks"] = [at("on_pre_optimizer_step", kfac.apply)]
        told = kfac.watch()
    elif kind != "adamw":
        manager = GRITManager(model, GRITConfig(mode=kind, kfac_min_samples=1))
        cls, told = partial(GritTrainer, grit_manager=manager), {"readings": manager.readings}
    trainer = cls(model=model, args=arguments(folder, **changes), train_dataset=items(), **kwargs)
    callback = ProbeCallback(every=EVERY, ledger=folder / "ledger.jsonl", **told)
    if probed:
        trainer.add_callback(callback)
    return trainer, callback


def weights(trainer):
    return [p.detach().clone() for p in weights_of(trainer.model)]


@pytest.mark.parametrize("kind", ["adamw", "notebook", "sgd", "eigen_adamw"])
def test_the_ledger_file_says_what_the_probe_saw_and_training_is_the_same(kind, tmp_path):
    trainer, callback = prepare(kind, tmp_path / "a", save_strategy="no")
    trainer.train()
    plain, _ = prepare(kind, tmp_path / "b", probed=False, save_strategy="no")
    plain.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), weights(plain), strict=True))
    lines = [json.loads(line) for line in (tmp_path / "a/ledger.jsonl").read_text().splitlines()]
    assert lines[:-1] == callback.probe.records and [r["step"] for r in lines[:-1]] == [0, 4, 6, 11]
    assert lines[-1]["events"] == callback.probe.events and lines[-1]["events"]["steps"] == STEPS
    read, seen = judge(Evidence.read(tmp_path / "a/ledger.jsonl")), judge(callback.probe)
    assert read.to_json() == seen.to_json()
    assert seen.verdict == ("no_effect" if kind == "adamw" else "effective"), seen.table()
    assert seen.claims == (kind != "adamw")
    assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())


@pytest.mark.parametrize("kind", ["adamw", "sgd", "eigen_adamw"])
def test_a_killed_run_has_the_ledger_of_an_undisturbed_one(kind, tmp_path):
    whole, undisturbed = prepare(kind, tmp_path / "whole")
    whole.train()
    killed(kind, tmp_path / "cut")
    with pytest.raises(ValueError, match="the run did not end"):
        Evidence.read(tmp_path / "cut/ledger.jsonl")
    assert len((tmp_path / "cut/ledger.jsonl").read_text().splitlines()) == 2  # steps 0 and 3
    again, resumed = prepare(kind, tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
    assert (tmp_path / "cut/ledger.jsonl").read_text() == (tmp_path / "whole/ledger.jsonl").read_text()
    assert resumed.probe.records == undisturbed.probe.records and resumed.probe.events == undisturbed.probe.events


DAMAGES = {
    "gone": shutil.rmtree,
    "cut shadow": lambda f: os.truncate(f / "shadow.safetensors", 40),
    "cut ledger": lambda f: (f / "ledger.json").write_text("{"),
    "empty ledger": lambda f: (f / "ledger.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_without_the_state_it_goes_on_and_says_so(damage, tmp_path, caplog):
    killed("adamw", tmp_path)
    damage(tmp_path / "probe-4")
    again, resumed = prepare("adamw", tmp_path)
    with caplog.at_level(logging.WARNING, logger="probes"):
        again.train(resume_from_checkpoint=True)
    assert "no state of this run in probe-4 beside the checkpoint" in caplog.text
    assert [(r["step"], r["cold"]) for r in resumed.probe.records] == [(step, True) for step in (4, 6, 11)]
    assert judge(resumed.probe).diagnosis == "no_samples", "a cold shadow is no yardstick"


def test_states_lie_beside_the_checkpoints_that_are_kept(tmp_path):
    (tmp_path / "probe-results").mkdir()  # the user's own
    trainer, _ = prepare("adamw", tmp_path, save_total_limit=1, save_steps=3)
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-12"]
    names = sorted(p.name for p in tmp_path.glob("probe-*"))
    assert {"probe-12", "probe-results"} <= {*names} and len(names) <= 3 and not list(tmp_path.glob("*.partial"))


def test_the_state_of_another_model_is_refused(tmp_path):
    model, other = tiny_llama(0), tiny_llama(0, r=2)
    save(Probe(model, torch.optim.AdamW(weights_of(model), lr=1e-2)), tmp_path / "probe-1")
    with pytest.raises(ValueError, match="same 12 tensors"):
        load(Probe(other, torch.optim.AdamW(weights_of(other), lr=1e-2)), tmp_path / "probe-1")
