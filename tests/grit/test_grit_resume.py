"""A run that was killed and resumed equals an undisturbed one to the bit: weights, statistics, moments, records."""

import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_grit_trainer import (
    Watch,
    arguments,
    libraries_are_no_garbage,  # noqa: F401
    lora_parameters,
    lora_weights,
    settings,
    sft_trainer,
    tiny_data,
    tiny_model,
)
from transformers import Trainer

from grit import GRITManager, GritOptimizer, GritTrainer

STEPS, KILLED_AT, SAVE_EVERY = 16, 7, 4
WEIGHTS = "adapter_model.safetensors"
SHRINKING = {"reprojection": "balanced", "reprojection_freq": 2, "rank_adaptation_threshold": 0.9}

CASES = {
    "eigen": {"mode": "eigen_adamw"},
    "eigen-gradients-adaptive": {"mode": "eigen_adamw", "capture": "gradients", "adaptive_schedule": True},
    "eigen-auto-throttled": {"mode": "eigen_adamw", "capture": "auto", "grit_cov_update_freq": 3},
    "eigen-events": {"mode": "eigen_adamw", "rank_shrink": "events", **SHRINKING},
    "eigen-events-gradients": {"capture": "gradients", "rank_shrink": "events", **SHRINKING},
    "adamw-adaptive": {"mode": "adamw", "adaptive_schedule": True},
    "adamw-gradients": {"mode": "adamw", "capture": "gradients"},
    "adamw-events-adaptive": {"mode": "adamw", "rank_shrink": "events", "adaptive_schedule": True, **SHRINKING},
    "adamw-projected-at-full-rank": {"mode": "adamw", "rank_shrink": "end", "lr_ratio_b": 2.0, **SHRINKING},
    "sgd-adaptive": {"mode": "sgd", "adaptive_schedule": True},
    "sgd-gradients": {"mode": "sgd", "capture": "gradients"},
    "sgd-events": {"mode": "sgd", "rank_shrink": "events", **SHRINKING},
}


class KilledError(Exception):
    pass


def config_of(case):
    """Inversions and records at steps that do not coincide with checkpoints; a trend that moves the intervals."""
    return settings(**{"kfac_update_freq": 3, "log_freq": 3, "adaptive_window": 3, **CASES[case]})


def make_trainer(case, folder, base="trainer"):
    """Everything afresh, as a new process would."""
    changes = {"max_steps": STEPS, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": SAVE_EVERY}
    if base == "sft":
        return sft_trainer(config_of(case), folder, tiny_model(rank=8), **changes)
    return GritTrainer(
        model=tiny_model(rank=8),
        args=arguments(folder, **changes, max_grad_norm=0.5, eval_strategy="steps", eval_steps=3),
        train_dataset=tiny_data(),
        eval_dataset=tiny_data(8, seed=9),
        grit_config=config_of(case),
    )


def kill(trainer):
    def stop(state, **_):
        if state.global_step == KILLED_AT:
            raise KilledError

    trainer.add_callback(Watch("on_step_end", stop))
    with pytest.raises(KilledError):
        trainer.train()


def assert_same(one, other, where=""):
    """Equal to the bit, NaN equal to NaN."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other), where
    elif isinstance(one, float) and math.isnan(one):
        assert math.isnan(other), where
    else:
        assert one == other, where


def assert_same_run(resumed, undisturbed, folder):
    """Adapter bytes, the manager, the optimizer below it, the loss and the log file."""
    for trainer, name in ((resumed, "resumed"), (undisturbed, "undisturbed")):
        trainer.save_model(str(folder / name))
    for file in (WEIGHTS, "adapter_config.json"):
        assert (folder / "resumed" / file).read_bytes() == (folder / "undisturbed" / file).read_bytes(), file
    one, other = resumed.grit_manager, undisturbed.grit_manager
    assert one.step == other.step == STEPS
    assert_same(one.history, other.history, "history")
    assert_same(one.state_dict(), other.state_dict(), "manager")
    assert_same(resumed.optimizer.state_dict(), undisturbed.optimizer.state_dict(), "optimizer")
    assert one.log_file.read_bytes() == other.log_file.read_bytes()
    losses = [[(e["step"], e["loss"]) for e in t.state.log_history if "loss" in e] for t in (resumed, undisturbed)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


@pytest.mark.parametrize(
    ("case", "base"), [*((case, "trainer") for case in CASES), ("eigen-events", "sft"), ("adamw-adaptive", "sft")]
)
def test_killed_and_resumed_equals_undisturbed(case, base, tmp_path):
    undisturbed = make_trainer(case, tmp_path / "a", base)
    undisturbed.train()
    kill(make_trainer(case, tmp_path / "b", base))
    checkpoint = tmp_path / "b" / "checkpoint-4"
    assert not (tmp_path / "b" / "checkpoint-8").exists()

    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    records = json.loads(saved["grit"]["history"])
    assert saved["grit"]["numbers"]["step"] == 4 and {r["step"] for r in records if r["kind"] == "effect"} == {0, 3}
    ranks = {w.shape[0] for name, w in load_file(checkpoint / WEIGHTS).items() if "lora_A" in name}
    if "events" in case:
        assert [r["step"] for r in records if r["kind"] == "reprojection"] == [2, 4]
        assert max(ranks) < 8 and len(ranks) > 1  # layers of one shape have become layers of several
    else:
        assert ranks == {8}

    resumed = make_trainer(case, tmp_path / "b", base)
    seen = []
    resumed.add_callback(Watch("on_train_begin", lambda **_: seen.append(resumed.grit_manager.step)))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert seen == [4]
    assert_same_run(resumed, undisturbed, tmp_path)

    manager = undisturbed.grit_manager  # and the run was one worth resuming
    assert manager.history[-1]["effect"]["effective"] and manager.ready_layers() == 6
    kinds = {"gradients"} if "gradients" in case else {"hooks"}
    assert set(manager.capture_kinds().values()) == kinds
    if "adaptive" in case:
        assert manager.trend.factor != 1.0


def test_a_run_without_the_manager_s_state_would_differ(tmp_path):
    """The comparison above can fail: without GRIT's part of the checkpoint it does."""
    undisturbed = make_trainer("eigen", tmp_path / "a")
    undisturbed.train()
    kill(make_trainer("eigen", tmp_path / "b"))
    resumed = make_trainer("eigen", tmp_path / "b")
    resumed.grit_manager.load_state_dict = lambda state: None
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    weights = lora_weights(resumed.model)
    assert all(not torch.equal(weights[name], w) for name, w in lora_weights(undisturbed.model).items())


def test_a_process_that_was_killed(tmp_path):
    """SIGKILL in the middle of step 7, in a process of its own; resumed from here."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        from test_grit_resume import Watch, make_trainer
        trainer = make_trainer(sys.argv[2], sys.argv[3])
        step = Watch("on_pre_optimizer_step", lambda state, **_: state.global_step == 6 and os.kill(os.getpid(), 9))
        trainer.add_callback(step)
        trainer.train()
        """
    )
    case, here, root = "eigen-events", Path(__file__).parent, Path(__file__).parents[2]
    command = [sys.executable, "-c", script, str(here), case, str(tmp_path / "b")]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == -9, process.stderr
    log = tmp_path / "b" / "grit_log.jsonl"
    assert max(json.loads(line)["step"] for line in log.read_text().splitlines()) == 6  # later than the checkpoint

    undisturbed, resumed = make_trainer(case, tmp_path / "a"), make_trainer(case, tmp_path / "b")
    undisturbed.train()
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, undisturbed, tmp_path)


def test_resuming_twice_and_from_the_end(tmp_path):
    """From checkpoint 4 to 8, from there to the end; and once more from the last one, where nothing is left to do."""
    undisturbed = make_trainer("adamw-events-adaptive", tmp_path / "a")
    undisturbed.train()
    kill(make_trainer("adamw-events-adaptive", tmp_path / "b"))
    again = make_trainer("adamw-events-adaptive", tmp_path / "b")

    def stop(state, **_):
        if state.global_step == 10:
            raise KilledError

    again.add_callback(Watch("on_step_end", stop))
    with pytest.raises(KilledError):
        again.train(resume_from_checkpoint=True)
    resumed = make_trainer("adamw-events-adaptive", tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-8"))
    assert_same_run(resumed, undisturbed, tmp_path)

    last = make_trainer("adamw-events-adaptive", tmp_path / "b")
    last.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-16"))
    assert_same_run(last, undisturbed, tmp_path)


@pytest.mark.parametrize("case", ["eigen-events", "adamw-projected-at-full-rank"])
def test_a_trainer_goes_back_to_an_earlier_checkpoint_of_its_own(case, tmp_path):
    """Ranks have shrunk since, at events or at the end: they grow back to what the checkpoint has."""
    trainer = make_trainer(case, tmp_path / "a")
    trainer.train()
    weights, state = lora_weights(trainer.model), trainer.grit_manager.state_dict()
    at_the_end = [pair.rank for pair in trainer.grit_manager.pairs()]
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    saved = load_file(tmp_path / "a" / "checkpoint-4" / WEIGHTS)
    assert sum(at_the_end) < sum(w.shape[0] for name, w in saved.items() if "lora_A" in name)
    assert_same(lora_weights(trainer.model), weights)
    assert_same(trainer.grit_manager.state_dict(), state)


@pytest.mark.parametrize("mode", ["eigen_adamw", "adamw"])
def test_an_optimizer_that_was_passed_is_given_the_smaller_weights(mode, tmp_path):
    """It is there before the checkpoint's ranks are known, and holds the weights of the full rank."""

    def make(folder):
        model = tiny_model(rank=8)
        manager = GRITManager(model, settings(mode=mode, rank_shrink="events", **SHRINKING))
        optimizer = GritOptimizer(torch.optim.AdamW(lora_parameters(model), lr=1e-2), manager)
        args = arguments(folder, max_steps=8, save_strategy="steps", save_steps=4)
        return GritTrainer(
            model=model, args=args, train_dataset=tiny_data(), grit_manager=manager, optimizers=(optimizer, None)
        )

    undisturbed, resumed = make(tmp_path / "a"), make(tmp_path / "b")
    undisturbed.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert_same(lora_weights(resumed.model), lora_weights(undisturbed.model))
    assert_same(resumed.grit_manager.state_dict(), undisturbed.grit_manager.state_dict())


def test_a_plain_loop_resumes_from_its_own_file(tmp_path):
    """state_dict of the GritOptimizer is all there is to keep besides the weights."""
    rows = tiny_data()
    batches = [{k: torch.tensor([row[k] for row in rows[i : i + 4]]) for k in rows[0]} for i in range(0, 64, 4)]

    def run(model, optimizer, chosen):
        for batch in chosen:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def make(mode, log=None):
        model = tiny_model(rank=8)
        manager = GRITManager(model, settings(mode=mode), log_file=log)
        cls = torch.optim.SGD if mode == "sgd" else torch.optim.AdamW
        options = {"momentum": 0.9} if mode == "sgd" else {}
        return model, GritOptimizer(cls(lora_parameters(model), lr=1e-2, **options), manager)

    for mode in ("eigen_adamw", "adamw", "sgd"):
        whole, optimizer = make(mode, tmp_path / "whole.jsonl")
        run(whole, optimizer, batches)
        first, early = make(mode, tmp_path / "parts.jsonl")
        run(first, early, batches[:7])
        torch.save({"optimizer": early.state_dict(), "weights": first.state_dict()}, tmp_path / "state.pt")
        run(first, early, batches[7:9])  # lost
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
        second, late = make(mode, tmp_path / "parts.jsonl")
        second.load_state_dict(saved["weights"])
        late.load_state_dict(saved["optimizer"])
        run(second, late, batches[7:])
        assert_same(lora_weights(second), lora_weights(whole))
        assert_same(late.state_dict(), optimizer.state_dict())
        assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_checkpoints_that_do_not_fit(tmp_path):
    kill(make_trainer("eigen", tmp_path / "b"))
    checkpoint = str(tmp_path / "b" / "checkpoint-4")

    plain = Trainer(
        model=tiny_model(rank=8),
        args=arguments(tmp_path / "plain", max_steps=4, save_strategy="steps", save_steps=4),
        train_dataset=tiny_data(),
    )
    plain.train()
    with pytest.raises(ValueError, match="expected an optimizer state with GRIT's part"):
        make_trainer("eigen", tmp_path / "c").train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-4"))

    saved = torch.load(Path(checkpoint) / "optimizer.pt", weights_only=True)
    other = tiny_model(rank=8, targets=("q_proj", "v_proj", "up_proj"))
    with pytest.raises(ValueError, match="expected a checkpoint of the same LoRA layers, got one that differs in"):
        GRITManager(other, settings()).load_state_dict(saved["grit"])
    with pytest.raises(ValueError, match="expected state of rank 4, got"):
        GRITManager(tiny_model(rank=4), settings()).load_state_dict(saved["grit"])
