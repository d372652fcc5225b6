"""Long trainings: epochs, items left out, the best adapter, early stopping, and kills in between."""

import json
import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.trainers.lasting_runs import scripted
from trainers import baseline_lora, twin
from trainers.common import run
from trainers.data import EncodingError, encode_example
from trainers.models import load_tokenizer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "adapter_model.safetensors"
GRIT = {
    "min_lora_rank": 1,
    "kfac_min_samples": 1,
    "grit_cov_update_freq": 1,
    "kfac_update_freq": 2,
    "log_freq": 4,
    "rank_adaptation_threshold": 0.6,
}
BEST = {"keep_best": True, "eval_steps": 2, "save_steps": 4, "max_steps": 12, "lr_scheduler": "constant"}
# The best is at step 6, which is no multiple of save_steps, and rotated away unless it is kept.
CURVE = {2: 3.0, 4: 3.5, 6: 2.0, 8: 2.5, 10: 2.2, 12: 2.1}


def weights(job):
    return (job.output / WEIGHTS).read_bytes()


def killed(tmp_path, module, job, losses, event, step):
    """Train in a process of its own, which dies there."""
    file = tmp_path / "run"
    file.write_bytes(pickle.dumps((module, job, losses, event, step)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainers.lasting_runs", str(file)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr[-3000:]
    assert not (job.output / WEIGHTS).exists()


def loss_of(job):
    """Mean over the batches of validation items of the loss per answer token, by stock transformers and PEFT."""
    tokenizer = load_tokenizer(job.base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(job.base.location), str(job.output)).eval()
    batches = []
    for first in range(0, len(job.valid), job.settings.batch_size):
        total, count = 0.0, 0
        for prompt, completion in job.valid[first : first + job.settings.batch_size]:
            ids, n = encode_example(tokenizer, prompt, completion)
            with torch.no_grad():
                scores = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
            for t in range(n, len(ids)):
                total, count = total - scores[t - 1, ids[t]].item(), count + 1
        batches.append(total / count)
    return sum(batches) / len(batches)


def timeless(history):
    """Without times; and without the closing train_loss, which transformers 5.17 takes from the last process alone."""
    left_out = ("runtime", "per_second", "train_loss")
    return [{k: v for k, v in e.items() if not any(word in k for word in left_out)} for e in history]


def test_epochs_are_steps_of_all_items(make_job):
    job = make_job(max_steps=None, epochs=1.5, gradient_accumulation=3)
    said = run(baseline_lora.ARM, job).summary
    # 64 items in batches of 4, three a step: 6 steps an epoch, the last one of one batch.
    assert said["steps"] == 9 and not said["stopped_early"]
    assert len(twin.losses(baseline_lora.ARM, make_job(max_steps=None, epochs=1.5, gradient_accumulation=3), 50)) == 9


def test_what_is_too_long_is_left_out_and_nothing_else_changes(make_job, capsys):
    plain = make_job(max_steps=6)
    long = ("What?\n", "1" * 300)
    filled = replace(
        make_job(max_steps=6, overlong="leave_out"),
        train=[*plain.train[:5], long, *plain.train[5:], long],
        valid=[long, *plain.valid],
    )
    said, expected = run(baseline_lora.ARM, filled).summary, run(baseline_lora.ARM, plain).summary
    assert weights(filled) == weights(plain)
    longest = len(encode_example(load_tokenizer(plain.base), *long)[0])
    assert (said["train_left_out"], said["valid_left_out"], said["longest"]) == (2, 1, longest)
    assert (expected["train_left_out"], expected["valid_left_out"]) == (0, 0) and expected["longest"] <= 128
    assert said["train_items"] == expected["train_items"] == 64
    assert said["final_eval_loss"] == expected["final_eval_loss"]
    printed = capsys.readouterr().out
    assert f"2 of 66 training items are longer than 128 tokens and are left out (longest {longest})" in printed
    assert f"1 of 17 validation items are longer than 128 tokens and are left out (longest {longest})" in printed
    again = replace(filled, output=make_job().output, checkpoints=make_job().checkpoints)
    assert twin.losses(baseline_lora.ARM, again, 4) == twin.losses(baseline_lora.ARM, make_job(max_steps=6), 4)
    with pytest.raises(EncodingError, match=r"at least one example of at most max_length = 128 tokens, got 2 of"):
        run(baseline_lora.ARM, replace(again, train=[long, long]))
    with pytest.raises(EncodingError, match="got 1 of"):
        run(baseline_lora.ARM, replace(again, valid=[long]))


@pytest.mark.parametrize(
    "grit", [None, GRIT | {"reprojection_freq": 4}, GRIT | {"rank_shrink": "events", "reprojection_freq": 5}]
)
def test_the_best_adapter_is_saved_as_if_training_had_ended_there(make_job, grit):
    """With a constant learning rate a run of six steps is the beginning of one of twelve.

    GRIT shrinks at the end of both: by statistics of the sixth step, in the axes that the weights had then.
    """
    module = "pure_grit" if grit else "baseline_lora"
    job, short = make_job(**BEST, grit=grit), make_job(**{**BEST, "keep_best": False, "max_steps": 6}, grit=grit)
    result = run(scripted(module, CURVE), job)
    run(scripted(module, {}), short)
    said = result.summary
    assert (said["best_step"], said["best_eval_loss"]) == (6, 2.0)
    assert said["steps"] == 12 and not said["stopped_early"]
    assert weights(job) == weights(short)
    assert (job.output / "adapter_config.json").read_bytes() == (short.output / "adapter_config.json").read_bytes()
    assert said["final_eval_loss"] == pytest.approx(loss_of(job), rel=1e-4)
    saved = load_file(job.output / WEIGHTS)
    assert said["trainable_parameters"] == sum(w.numel() for w in saved.values())
    if grit:
        assert min(w.shape[0] for n, w in saved.items() if "lora_A" in n) < 4, "nothing has shrunk"
        log = [json.loads(line) for line in (job.output / "grit_log.jsonl").open()]
        assert {"step": 6, "kind": "best", "trained_to": 12} in log
        assert log[-1]["kind"] == "final" and log[-1]["step"] == 6 and said["grit"]["effective"]
        assert any(entry["step"] == 8 for entry in log)  # what came after is not lost


def test_the_best_one_comes_back_with_the_ranks_it_had(make_job):
    """Tensors shrink at step 8, after the best step; there is nothing by which to shrink the larger ones again."""
    job = make_job(**BEST, grit={**GRIT, "rank_shrink": "events", "reprojection_freq": 8})
    result = run(scripted("pure_grit", CURVE), job)
    best, last = (load_file(job.checkpoints / f"checkpoint-{step}" / WEIGHTS) for step in (6, 12))
    saved = load_file(job.output / WEIGHTS)
    assert result.summary["grit"]["effective"]
    assert any(last[n].shape != w.shape for n, w in best.items()), "nothing has shrunk"
    assert saved.keys() == best.keys() and all(torch.equal(saved[n], w) for n, w in best.items())
    assert result.summary["final_eval_loss"] == pytest.approx(loss_of(job), rel=1e-4)


def test_the_last_one_is_saved_where_no_loss_is_finite(make_job, capsys):
    job, plain = make_job(**BEST), make_job(**{**BEST, "keep_best": False})
    said = run(scripted("baseline_lora", dict.fromkeys(CURVE, math.nan)), job).summary
    run(baseline_lora.ARM, plain)
    assert weights(job) == weights(plain)
    assert said["best_step"] is None and "no evaluation loss was finite" in capsys.readouterr().err


STOPS = {"eval_steps": 2, "save_steps": 2, "max_steps": 40, "early_stopping_patience": 3}
# 0.05 better than the best is not enough below; the third such evaluation in a row is at step 12, and step 10 has the
# lowest loss all the same.
STALE = {2: 3.0, 4: 3.2, 6: 2.0, 8: 2.3, 10: 1.97, 12: 1.98, 14: 1.0, 16: 1.0}


@pytest.mark.parametrize("module", ["baseline_lora", "pure_grit"])
def test_it_stops_early_and_a_kill_changes_no_bit(make_job, tmp_path, module):
    settings = {**STOPS, "early_stopping_min_delta": 0.05, "grit": GRIT if module == "pure_grit" else None}
    undisturbed = make_job(**settings)
    whole = run(scripted(module, STALE), undisturbed)
    assert whole.summary["stopped_early"] and whole.summary["steps"] == 12
    assert (whole.summary["best_step"], whole.summary["best_eval_loss"]) == (10, 1.97)
    if module == "baseline_lora":  # GRIT shrinks ranks before it saves
        saved = load_file(undisturbed.output / WEIGHTS)
        best, last = (load_file(undisturbed.checkpoints / f"checkpoint-{step}" / WEIGHTS) for step in (10, 12))
        assert saved.keys() == best.keys() and all(torch.equal(w, best[n]) for n, w in saved.items())
        assert any(not torch.equal(w, last[n]) for n, w in saved.items())
    # With two evaluations without improvement behind it; and when everything was saved but the adapter.
    for step, resumed_from in ((10, 10), (12, 10)):
        job = make_job(**settings, checkpoints=tmp_path / f"checkpoints-{step}")
        killed(tmp_path, module, job, STALE, "on_save", step)
        result = run(scripted(module, STALE), job)
        assert result.resumed_from == resumed_from
        assert weights(job) == weights(undisturbed)
        assert timeless(result.history) == timeless(whole.history)
        differ = {k for k, v in result.summary.items() if v != whole.summary[k]}
        assert differ <= {"train_seconds", "resumed_from_step", "peak_memory_bytes"}
        ledger = "probe_ledger.jsonl"
        assert (job.output / ledger).read_bytes() == (undisturbed.output / ledger).read_bytes()


def test_the_best_checkpoint_outlives_rotation_and_a_kill(make_job, tmp_path):
    """Six evaluations after the best one, of which three checkpoints are kept, and a kill in between."""
    settings = {**BEST, "max_steps": 16}
    losses = {2: 3.0, 4: 1.0, **dict.fromkeys(range(6, 17, 2), 2.0)}
    undisturbed = make_job(**settings)
    run(scripted("baseline_lora", losses), undisturbed)
    job = make_job(**settings, checkpoints=tmp_path / "checkpoints")
    killed(tmp_path, "baseline_lora", job, losses, "on_step_end", 13)
    assert sorted(p.name for p in job.checkpoints.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (10, 12, 4)]
    result = run(scripted("baseline_lora", losses), job)
    assert result.resumed_from == 12 and result.summary["best_step"] == 4
    assert weights(job) == weights(undisturbed)


@pytest.mark.parametrize("steps", [14, 16], ids=["within an epoch", "at its end"])
def test_a_kill_after_the_last_checkpoint_changes_no_bit(make_job, tmp_path, steps):
    """From the checkpoint of the last step the Trainer would go on for a step too many."""
    undisturbed = make_job(max_steps=steps)
    whole = run(baseline_lora.ARM, undisturbed)
    job = make_job(max_steps=steps, checkpoints=tmp_path / "checkpoints")
    killed(tmp_path, "baseline_lora", job, {}, "on_save", steps)
    assert (job.checkpoints / f"checkpoint-{steps}" / "trainer_state.json").is_file()
    result = run(baseline_lora.ARM, job)
    assert result.resumed_from == 12 and result.summary["steps"] == steps
    assert weights(job) == weights(undisturbed)
    assert timeless(result.history) == timeless(whole.history)


def test_pure_grit_is_told_apart_from_the_last_step(make_job):
    """The same run without keep_best saves another adapter: what the tests above compare is not always the same."""
    grit = {**GRIT, "reprojection_freq": 4}
    best, last = make_job(**BEST, grit=grit), make_job(**{**BEST, "keep_best": False}, grit=grit)
    for job in (best, last):
        run(scripted("pure_grit", CURVE), job)
    assert weights(best) != weights(last)
