"""The probe on Trainers: a ledger file, the same after a kill and a resume as without one."""

import json
import logging
import shutil
from functools import partial

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from grit import GRITConfig, GRITManager, GritTrainer
from probes import Evidence, Probe, ProbeCallback, judge
from probes.trainer import LedgerFile, load, save

from benchmarks._notebook import NotebookKFAC  # isort: skip
from benchmarks._runners import at  # isort: skip
from benchmarks._tiny_llama import BATCH, example, tiny_llama, weights_of  # isort: skip

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, SAVE, KILLED, EVERY = 12, 4, 6, 3


class KilledError(Exception):
    pass


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


def items():
    generator = torch.Generator().manual_seed(3)
    return [example(generator, padded=i % 2 == 0) for i in range(32)]


def arguments(folder, **changes):
    values = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "save_steps": SAVE,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 0.5,
        **changes,
    }
    return TrainingArguments(**values)


SHRINKING = {"reprojection_freq": 2, "rank_shrink": "events", "min_lora_rank": 1, "rank_adaptation_threshold": 0.8}


def prepare(kind, folder, probed=True, **changes):
    """Model, trainer and probe afresh, as a new process would."""
    model = tiny_llama(0)
    told, kwargs, cls = {}, {}, Trainer
    if kind == "notebook":
        kfac = NotebookKFAC(model)
        kwargs["callbacks"] = [at("on_pre_optimizer_step", kfac.apply)]
        told = kfac.watch()
    elif kind != "adamw":
        settings = {"kfac_min_samples": 1, **(SHRINKING if kind == "shrinking" else {})}
        manager = GRITManager(model, GRITConfig(mode="eigen_adamw" if kind == "shrinking" else kind, **settings))
        cls, told = partial(GritTrainer, grit_manager=manager), {"grit": manager}
    trainer = cls(model=model, args=arguments(folder, **changes), train_dataset=items(), **kwargs)
    callback = ProbeCallback(every=EVERY, ledger=folder / "ledger.jsonl", **told) if probed else None
    if callback is not None:
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
    assert lines[:-1] == callback.probe.records and [r["step"] for r in lines[:-1]] == [0, 3, 6, 9]
    assert lines[-1]["events"] == callback.probe.events and lines[-1]["events"]["steps"] == STEPS
    read, seen = judge(Evidence.read(tmp_path / "a/ledger.jsonl")), judge(callback.probe)
    assert read.to_json() == seen.to_json()
    assert seen.verdict == ("no_effect" if kind == "adamw" else "effective"), seen.table()
    assert seen.claims == (kind != "adamw")


def test_the_shadow_clips_as_the_trainer_does(tmp_path):
    trainer, callback = prepare("adamw", tmp_path, save_strategy="no", max_grad_norm=0.01)
    trainer.train()
    assert callback.probe.max_grad_norm == 0.01
    entries = [e for r in callback.probe.records for e in r["units"].values()]
    assert all(e["norm_door"] <= 0.0101 for e in entries) and any(e["norm_raw"] > 0.05 for e in entries)
    assert judge(callback.probe).numbers["angle_highest"] < 1e-3


@pytest.mark.parametrize("kind", ["adamw", "sgd", "eigen_adamw", "shrinking"])
def test_a_killed_run_has_the_ledger_of_an_undisturbed_one(kind, tmp_path):
    whole, undisturbed = prepare(kind, tmp_path / "whole")
    whole.train()
    first, _ = prepare(kind, tmp_path / "cut")
    first.add_callback(Kill(KILLED))
    with pytest.raises(KilledError):
        first.train()
    with pytest.raises(ValueError, match="the run did not end"):
        Evidence.read(tmp_path / "cut/ledger.jsonl")
    assert len((tmp_path / "cut/ledger.jsonl").read_text().splitlines()) == 2  # steps 0 and 3
    again, resumed = prepare(kind, tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
    assert (tmp_path / "cut/ledger.jsonl").read_text() == (tmp_path / "whole/ledger.jsonl").read_text()
    assert resumed.probe.records == undisturbed.probe.records and resumed.probe.events == undisturbed.probe.events
    if kind == "shrinking":
        ranks = {unit.sides["a"].shape[0] for unit in resumed.probe.tensors.units}
        assert min(ranks) < 4


def test_killed_twice_in_the_same_place(tmp_path):
    """The second try dies between two checkpoints as well; the third has it all."""
    whole, _ = prepare("adamw", tmp_path / "whole")
    whole.train()
    for step in (KILLED, KILLED + 1, 10):
        trainer, _ = prepare("adamw", tmp_path / "cut")
        trainer.add_callback(Kill(step))
        with pytest.raises(KilledError):
            trainer.train(resume_from_checkpoint=(tmp_path / "cut" / "checkpoint-4").is_dir() or None)
    trainer, _ = prepare("adamw", tmp_path / "cut")
    trainer.train(resume_from_checkpoint=True)
    assert (tmp_path / "cut/ledger.jsonl").read_text() == (tmp_path / "whole/ledger.jsonl").read_text()


def cut_shadow(folder):
    file = folder / "shadow.safetensors"
    file.write_bytes(file.read_bytes()[:40])


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        cut_shadow,
        lambda f: (f / "ledger.json").write_text("{"),
        lambda f: (f / "ledger.json").write_text("{}"),
    ],
    ids=["gone", "cut shadow", "cut ledger", "empty ledger"],
)
def test_without_the_state_it_goes_on_and_says_so(damage, tmp_path, caplog):
    first, _ = prepare("adamw", tmp_path)
    first.add_callback(Kill(KILLED))
    with pytest.raises(KilledError):
        first.train()
    damage(tmp_path / "probe-4")
    again, resumed = prepare("adamw", tmp_path)
    with caplog.at_level(logging.WARNING, logger="probes"):
        again.train(resume_from_checkpoint=True)
    assert "no state of this run in probe-4 beside the checkpoint" in caplog.text
    assert [(r["step"], r["cold"]) for r in resumed.probe.records] == [(6, True), (9, True)]
    assert judge(resumed.probe).diagnosis == "no_samples", "a cold shadow is no yardstick"


def test_files_of_the_user_beside_checkpoints_stay(tmp_path):
    (tmp_path / "probe-results").mkdir()
    (tmp_path / "probe-results" / "notes.txt").write_text("mine")
    trainer, _ = prepare("adamw", tmp_path, save_total_limit=1, save_steps=3)
    trainer.train()
    assert (tmp_path / "probe-results" / "notes.txt").read_text() == "mine"


def test_states_of_checkpoints_at_the_end_of_an_epoch(tmp_path):
    trainer, _ = prepare("adamw", tmp_path, save_strategy="epoch")
    trainer.train()
    steps = {p.name.rsplit("-", 1)[-1] for p in tmp_path.glob("checkpoint-*")}
    assert steps and all((tmp_path / f"probe-{step}" / "shadow.safetensors").is_file() for step in steps)


def test_a_second_training_starts_a_ledger_of_its_own(tmp_path):
    trainer, callback = prepare("adamw", tmp_path, save_strategy="no")
    trainer.train()
    first = callback.probe
    trainer.train()
    assert callback.probe is not first and callback.probe.step == first.step
    assert len(Evidence.read(callback._file.path).records) == len(callback.probe.records)


def test_states_lie_beside_the_checkpoints_that_are_kept(tmp_path):
    trainer, _ = prepare("adamw", tmp_path, save_total_limit=1, save_steps=3)
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-12"]
    names = sorted(p.name for p in tmp_path.glob("probe-*"))
    assert "probe-12" in names and len(names) <= 2 and not list(tmp_path.glob("*.partial"))


def test_hooks_are_gone_after_training(tmp_path):
    trainer, callback = prepare("adamw", tmp_path, save_strategy="no")
    trainer.train()
    assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())
    assert not trainer.model._forward_pre_hooks and not trainer.model._forward_hooks
    before = [g.clone() for g in callback.probe.tensors.raw]
    trainer.model(**{k: v[None] for k, v in items()[0].items()}).loss.backward()
    trainer.optimizer.step()
    assert callback.probe.step == STEPS
    assert all(torch.equal(a, b) for a, b in zip(before, callback.probe.tensors.raw, strict=True))


def test_readings_and_grit_exclude_each_other():
    with pytest.raises(ValueError, match="got both"):
        ProbeCallback(readings=list, grit=object())


def test_save_appears_whole_and_load_refuses_another_model(tmp_path):
    model = tiny_llama(0)
    probe = Probe(model, torch.optim.AdamW(weights_of(model), lr=1e-2))
    (tmp_path / "probe-1").mkdir()
    (tmp_path / "probe-1" / "left over").write_text("")
    save(probe, tmp_path / "probe-1")
    assert sorted(p.name for p in (tmp_path / "probe-1").iterdir()) == ["ledger.json", "shadow.safetensors"]
    load(probe, tmp_path / "probe-1")
    other = tiny_llama(0, r=2)
    with pytest.raises(ValueError, match="same 12 tensors"):
        load(Probe(other, torch.optim.AdamW(weights_of(other), lr=1e-2)), tmp_path / "probe-1")


def test_a_ledger_file_refuses_what_json_does_not_know(tmp_path):
    file = LedgerFile(tmp_path / "new" / "ledger.jsonl")
    with pytest.raises(ValueError, match="[Oo]ut of range float"):
        file.append({"step": 0, "loss": float("nan"), "units": {}})


def test_trls_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trainers.common import sft_trainer_class

    rows = [{k: v.tolist() for k, v in item.items() if k == "input_ids"} for item in items()]
    rows = [{"input_ids": [i for i in row["input_ids"] if i]} for row in rows]
    model = tiny_llama(0)
    values = {
        "output_dir": str(tmp_path),
        "max_steps": 8,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
    }
    trainer = sft_trainer_class()(
        model=model,
        args=trl.SFTConfig(**values),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=_tokenizer(),
    )
    callback = ProbeCallback(every=2, ledger=tmp_path / "ledger.jsonl")
    trainer.add_callback(callback)
    trainer.train()
    assert judge(Evidence.read(tmp_path / "ledger.jsonl")).diagnosis == "equals_shadow"
    tokens = [r["tokens"] for r in callback.probe.records]
    assert len(tokens) == 4 and all(0 < t["attended"] <= t["all"] for t in tokens)
    assert any(t["attended"] < t["all"] for t in tokens)


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, 31)}, "<eos>": 31}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
