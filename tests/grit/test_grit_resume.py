"""A run that was killed and resumed equals an undisturbed one to the bit: weights, statistics, moments, records."""

import json

import pytest
import torch
from safetensors.torch import load_file

from grit import GRITManager, GritOptimizer
from tests.grit.nets import MODES, inner_for, lora, lora_weights, of_kind, quick, same, train, trainable
from tests.grit.test_grit_trainer import Watch, grit_trainer, logged_by, settings, tiny_data, tiny_model

STEPS = 16
WEIGHTS = "adapter_model.safetensors"
SHRINKING = {"reprojection": "balanced", "reprojection_freq": 2, "rank_adaptation_threshold": 0.9}

CASES = {
    "eigen-gradients": {"mode": "eigen_adamw", "capture": "gradients"},
    "eigen-throttled": {"mode": "eigen_adamw", "grit_cov_update_freq": 3},
    "eigen-projected": {"mode": "eigen_adamw", **SHRINKING},
    "adamw-projected": {"mode": "adamw", "lr_ratio_b": 2.0, **SHRINKING},
    "sgd-projected-gradients": {"mode": "sgd", "capture": "gradients", **SHRINKING},
}


def make_trainer(case, folder):
    """Inversions and records at steps that do not coincide with checkpoints."""
    config = settings(**{"kfac_update_freq": 3, "log_freq": 3, **CASES[case]})
    changes = {"max_steps": STEPS, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 4}
    changes |= {"max_grad_norm": 0.5, "eval_strategy": "steps", "eval_steps": 3}
    given = {"eval_dataset": tiny_data(8, seed=9)}
    return grit_trainer(folder, config, tiny_model(rank=8), of_trainer=given, **changes)


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_undisturbed(case, tmp_path):
    undisturbed = make_trainer(case, tmp_path / "a")
    undisturbed.train()

    def kill(state, **_):
        if state.global_step == 7:
            raise KeyboardInterrupt

    killed = make_trainer(case, tmp_path / "b")
    killed.add_callback(Watch("on_step_end", kill))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    checkpoint = tmp_path / "b" / "checkpoint-4"
    assert not (tmp_path / "b" / "checkpoint-8").exists()

    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    records = json.loads(saved["grit"]["history"])
    assert saved["grit"]["numbers"]["step"] == 4 and {r["step"] for r in of_kind(records, "effect")} == {0, 3}
    ranks = {w.shape[0] for name, w in load_file(checkpoint / WEIGHTS).items() if "lora_A" in name}
    assert ranks == {8}
    if "projected" in case:
        assert [r["step"] for r in of_kind(records, "reprojection")] == [2, 4]
        assert max(pair.rank for pair in undisturbed.grit_manager.pairs()) < 8  # at the end

    assert killed.grit_manager.history[-1]["step"] > 4  # what came after the checkpoint does not stay in the log

    manager, seen = undisturbed.grit_manager, []
    undisturbed.save_model(str(tmp_path / "undisturbed"))
    for start in (4, STEPS):  # from the last one nothing is left to do
        resumed = make_trainer(case, tmp_path / "b")
        resumed.add_callback(Watch("on_train_begin", lambda one=resumed, **_: seen.append(one.grit_manager.step)))
        resumed.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{start}"))
        assert seen[-1] == start
        one = resumed.grit_manager
        assert one.step == manager.step == STEPS
        assert same(one.history, manager.history) and same(one.state_dict(), manager.state_dict())
        assert same(lora_weights(resumed.model), lora_weights(undisturbed.model))
        assert same(resumed.optimizer.state_dict(), undisturbed.optimizer.state_dict())
        assert one.log_file.read_bytes() == manager.log_file.read_bytes()
        assert logged_by(resumed) == logged_by(undisturbed) and len(logged_by(resumed)) == STEPS
        resumed.save_model(str(tmp_path / "resumed"))
        for file in (WEIGHTS, "adapter_config.json"):
            assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes(), file

    # And the run was one worth resuming.
    assert manager.history[-1]["effect"]["effective"] and manager.curvature.ready_layers() == 6
    kinds = {"gradients"} if "gradients" in case else {"hooks"}
    assert set(manager.curvature.capture_kinds().values()) == kinds


@pytest.mark.parametrize("mode", MODES)
def test_a_plain_loop_resumes_from_its_own_file(mode, tmp_path):
    """state_dict of the GritOptimizer is all there is to keep besides the weights."""

    def make(log):
        manager = GRITManager(model := lora(), quick(mode=mode), log_file=log)
        return model, GritOptimizer(inner_for(mode, trainable(model)), manager)

    whole, optimizer = make(tmp_path / "whole.jsonl")
    train(whole, optimizer, 16)
    first, early = make(tmp_path / "parts.jsonl")
    train(first, early, 7)
    torch.save({"optimizer": early.state_dict(), "weights": first.state_dict()}, tmp_path / "state.pt")
    train(first, early, 2, 7)  # lost
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second, late = make(tmp_path / "parts.jsonl")
    second.load_state_dict(saved["weights"])
    late.load_state_dict(saved["optimizer"])
    train(second, late, 9, 7)
    assert same(lora_weights(second), lora_weights(whole))
    assert same(late.state_dict(), optimizer.state_dict())
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
