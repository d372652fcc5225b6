"""One training path: repeatable, resumed to the bit, the best adapter, early stopping, clear errors."""

import json
import math
import os
import subprocess
import sys

import httpx
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.trainers.runs import ROOT, history, interrupted, killed, scripted
from trainers import TrainingError, arms
from trainers.arms import baseline_lora, pure_grit
from trainers.encode import encode_example
from trainers.models import load_base_model, load_tokenizer, reason_of
from trainers.run import latest_complete, run
from trainers.settings import BaseReference

WEIGHTS = "adapter_model.safetensors"
ARM = baseline_lora.ARM
GRIT = dict(min_lora_rank=1, kfac_min_samples=1, grit_cov_update_freq=1, kfac_update_freq=2, log_freq=4,
            rank_adaptation_threshold=0.6)  # fmt: skip


def test_arms_are_found_by_their_files_without_loading_torch():
    assert arms.names()[0] == "baseline_lora" and set(arms.names()) >= {"grit_vlm", "hybrid_grit", "pure_grit"}
    assert all(arms.load(name).name == name for name in arms.names())
    code = "import sys; from trainers import arms; [arms.load(n) for n in arms.names()]; "
    code += "print({'torch', 'transformers', 'trl', 'unsloth'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_same_seed_same_bytes_other_seed_other_bytes(make_job, adapter_dir):
    again, other = make_job(), make_job(seed=1)
    run(ARM, again)
    run(ARM, other)
    first = (adapter_dir / WEIGHTS).read_bytes()
    assert (again.output / WEIGHTS).read_bytes() == first
    assert (other.output / WEIGHTS).read_bytes() != first


def test_half_written_checkpoints_are_passed_over(tmp_path):
    for step, state in ((4, '{"global_step": 4}'), (8, '{"global_st'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state:
            (folder / "trainer_state.json").write_text(state)
    assert latest_complete(tmp_path).name == "checkpoint-4"
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4"]
    assert latest_complete(tmp_path / "nowhere") is None


def test_target_module_that_matches_nothing(make_job):
    with pytest.raises(TrainingError) as caught:
        run(ARM, make_job(target_modules=["q_proj", "qq_proj", "fancy"]))
    text = str(caught.value)
    assert "'qq_proj' matches nothing (did you mean 'q_proj'?)" in text and "'fancy' matches nothing" in text
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert name in text.split("Linear modules of this model:")[1]


def test_4_bit_base_trains(make_job):
    job = make_job(quantize_base="nf4", max_steps=4, eval_steps=4)
    model = load_base_model(job.base, job.settings)
    assert sum(type(m).__name__ == "Linear4bit" for m in model.modules()) == 14
    assert run(ARM, job)["steps"] == 4
    assert all(w.isfinite().all() for w in load_file(job.output / WEIGHTS).values())


def test_why_a_base_cannot_be_loaded(tmp_path):
    """By transformers or Unsloth, whose long text stands for what the hub raised."""
    error = RuntimeError("no config file\n\nAutoConfig error: long\n")
    error.__cause__ = httpx.ConnectTimeout("timed out")
    said = reason_of(error, BaseReference("org/name"))
    assert said.startswith("the hub cannot be reached") and "\n" not in said and "AutoConfig" not in said
    assert "AutoConfig error: long" in reason_of(error, BaseReference(str(tmp_path)))


# Long trainings

BEST = {"keep_best": True, "eval_steps": 2, "save_steps": 4, "max_steps": 12, "lr_scheduler": "constant"}
# The best is at step 6, which is no multiple of save_steps, and rotated away unless it is kept.
CURVE = {2: 3.0, 4: 3.5, 6: 2.0, 8: 2.5, 10: 2.2, 12: 2.1}


def weights(job):
    return (job.output / WEIGHTS).read_bytes()


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


def timeless(job):
    """Its history save times and the closing train_loss, which transformers 5.17 takes from the last process alone."""
    left_out = ("runtime", "per_second", "train_loss")
    return [{k: v for k, v in e.items() if not any(word in k for word in left_out)} for e in history(job)]


def test_evaluations_do_not_change_dropout(make_job):
    jobs = [make_job(dropout=0.3, max_steps=8, eval_steps=steps) for steps in (2, 8)]
    for job in jobs:
        run(ARM, job)
    assert weights(jobs[0]) == weights(jobs[1])


@pytest.mark.parametrize("grit", [None, GRIT | {"reprojection_freq": 4}])
def test_the_best_adapter_is_saved_as_if_training_had_ended_there(make_job, grit):
    """With a constant learning rate a run of six steps is the beginning of one of twelve.

    GRIT shrinks at the end of both: by statistics of the sixth step, in the axes that the weights had then.
    """
    module = "pure_grit" if grit else "baseline_lora"
    job, short = make_job(**BEST, grit=grit), make_job(**{**BEST, "keep_best": False, "max_steps": 6}, grit=grit)
    said = run(scripted(module, CURVE), job)
    run(scripted(module, {}), short)
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


def test_the_last_one_is_saved_where_no_loss_is_finite(make_job, capsys):
    job = make_job(**BEST)
    said = run(scripted("baseline_lora", dict.fromkeys(CURVE, math.nan)), job)
    last = load_file(job.checkpoints / "checkpoint-12" / WEIGHTS)
    assert all(torch.equal(w, last[n]) for n, w in load_file(job.output / WEIGHTS).items())
    assert said["best_step"] is None and "no evaluation loss was finite" in capsys.readouterr().err


STOPS = {"eval_steps": 2, "save_steps": 2, "max_steps": 40, "early_stopping_patience": 3}
# 0.05 better than the best is not enough below; the third such evaluation in a row is at step 12, and step 10 has the
# lowest loss all the same.
STALE = {2: 3.0, 4: 3.2, 6: 2.0, 8: 2.3, 10: 1.97, 12: 1.98, 14: 1.0, 16: 1.0}


@pytest.mark.parametrize("ends", [interrupted, pytest.param(killed, marks=pytest.mark.full)])
@pytest.mark.parametrize("module", ["baseline_lora", "pure_grit"])
def test_it_stops_early_and_goes_on_to_the_same_bits(make_job, tmp_path, module, ends):
    settings = {**STOPS, "early_stopping_min_delta": 0.05, "grit": GRIT if module == "pure_grit" else None}
    undisturbed = make_job(**settings)
    whole = run(scripted(module, STALE), undisturbed)
    assert whole["stopped_early"] and whole["steps"] == 12
    assert (whole["best_step"], whole["best_eval_loss"]) == (10, 1.97)
    if module == "baseline_lora":  # GRIT shrinks ranks before it saves
        saved = load_file(undisturbed.output / WEIGHTS)
        best, last = (load_file(undisturbed.checkpoints / f"checkpoint-{step}" / WEIGHTS) for step in (10, 12))
        assert saved.keys() == best.keys() and all(torch.equal(w, best[n]) for n, w in saved.items())
        assert any(not torch.equal(w, last[n]) for n, w in saved.items())
    # With two evaluations without improvement behind it; and when everything was saved but the adapter.
    for step, resumed_from in ((10, 10), (12, 10)):
        job = make_job(**settings, checkpoints=tmp_path / f"checkpoints-{step}")
        ends(module, job, STALE, "on_save", step)
        assert not (job.output / WEIGHTS).exists()
        result = run(scripted(module, STALE), job)
        assert result["resumed_from_step"] == resumed_from
        assert weights(job) == weights(undisturbed)
        assert timeless(job) == timeless(undisturbed)
        differ = {k for k, v in result.items() if v != whole[k]}
        assert differ <= {"train_seconds", "resumed_from_step", "peak_memory_bytes"}
        ledger = "probe_ledger.jsonl"
        assert (job.output / ledger).read_bytes() == (undisturbed.output / ledger).read_bytes()


@pytest.mark.parametrize("steps", [14, 16], ids=["within an epoch", "at its end"])
def test_an_end_after_the_last_checkpoint_changes_no_bit(make_job, tmp_path, steps):
    """From the checkpoint of the last step the Trainer would go on for a step too many."""
    undisturbed = make_job(max_steps=steps)
    run(ARM, undisturbed)
    job = make_job(max_steps=steps, checkpoints=tmp_path / "checkpoints")
    interrupted("baseline_lora", job, {}, "on_save", steps)
    assert (job.checkpoints / f"checkpoint-{steps}" / "trainer_state.json").is_file()
    result = run(ARM, job)
    assert result["resumed_from_step"] == 12 and result["steps"] == steps
    assert weights(job) == weights(undisturbed)
    assert timeless(job) == timeless(undisturbed)


# Pure GRIT


def test_it_differs_from_the_baseline_in_the_optimizer_only(make_job, adapter_dir):
    job = make_job(grit=GRIT)
    result = run(pure_grit.ARM, job)
    plain = json.loads((adapter_dir / "loss_history.json").read_text())
    first, other = (next(e["loss"] for e in entries if "loss" in e) for entries in (history(job), plain))
    # Two steps in, of which the first saw the same weights and the same items.
    assert first == pytest.approx(other, rel=0.05)
    said = result["grit"]
    assert said["effective"] and set(said["capture"].values()) == {"hooks"} and said["inversions"] > 3
    assert ("peak_gpu_memory_bytes" in result) == torch.cuda.is_available(), "absent, not zero, on a CPU"
    assert result["final_loss"] == [e["loss"] for e in history(job) if "loss" in e][-1]
    kinds = [json.loads(line)["kind"] for line in (job.output / "grit_log.jsonl").open()]
    assert kinds[-1] == "final" and "effect" in kinds
    assert weights(job) != (adapter_dir / WEIGHTS).read_bytes()
