"""One shared training path: repeatable, resumable, and clear about what does not fit."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import load_file

from trainers import ARMS
from trainers.baseline_lora import ARM
from trainers.checkpoints import latest_complete
from trainers.common import run, sft_trainer_class
from trainers.models import ModelError, add_lora, check_target_modules, load_base_model

pytestmark = pytest.mark.slow
WEIGHTS = "adapter_model.safetensors"


def test_arms_are_modules_with_their_own_name():
    import importlib

    for name, module in ARMS.items():
        assert importlib.import_module(module).ARM.name == name


def test_same_seed_same_bytes_other_seed_other_bytes(make_job, adapter_dir):
    again, other = make_job(), make_job(seed=1)
    run(ARM, again)
    run(ARM, other)
    first = (adapter_dir / WEIGHTS).read_bytes()
    assert (again.output / WEIGHTS).read_bytes() == first
    assert (other.output / WEIGHTS).read_bytes() != first


def test_it_learns_and_says_so(adapter_dir):
    history = json.loads((adapter_dir / "loss_history.json").read_text())
    losses = [e["loss"] for e in history if "loss" in e]
    assert [e["step"] for e in history if "loss" in e] == [2, 4, 6, 8, 10, 12]
    assert losses[-1] < losses[0]
    assert [e["step"] for e in history if "eval_loss" in e] == [6, 12]
    weights = load_file(adapter_dir / WEIGHTS)
    assert all(w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name)
    assert {n.split(".")[-3] for n in weights} == {"q_proj", "v_proj", "down_proj"}


def test_the_loss_counts_answer_tokens_only(make_job):
    """The trainer's loss equals the cross-entropy over completion tokens, worked out here from the logits."""
    job = make_job()
    seen = {}

    def capture(settings, **kwargs):
        seen["trainer"] = sft_trainer_class()(**kwargs)
        return seen["trainer"]

    from dataclasses import replace

    run(replace(ARM, make_trainer=capture), job)
    trainer = seen["trainer"]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = trainer.compute_loss(model, dict(batch))
    # What carries loss is worked out here from the texts, not taken from the trainer.
    tokenizer = trainer.processing_class
    expected, count = 0.0, 0
    for i, (prompt, completion) in enumerate(job.train[:4]):
        ids = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
        assert batch["input_ids"][i, : len(ids)].tolist() == ids
        for t in range(len(tokenizer(prompt)["input_ids"]), len(ids)):
            expected -= torch.log_softmax(logits[i, t - 1].float(), -1)[ids[t]].item()
            count += 1
    assert loss.item() == pytest.approx(expected / count, rel=1e-4)


def test_killed_and_resumed_equals_undisturbed(make_job, tmp_path):
    import pickle

    undisturbed, job = make_job(max_steps=120), make_job(max_steps=120, checkpoints=tmp_path / "checkpoints")
    run(ARM, undisturbed)
    script = textwrap.dedent(
        """
        import pickle, sys
        from trainers.baseline_lora import ARM
        from trainers.common import run
        with open(sys.argv[1], "rb") as file:
            run(ARM, pickle.load(file))
        """
    )
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "job")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while latest_whole(job.checkpoints) < 8:
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (job.output / WEIGHTS).exists()
    result = run(ARM, job)
    assert 8 <= result.resumed_from < 120  # the last one that was whole
    assert (job.output / WEIGHTS).read_bytes() == (undisturbed.output / WEIGHTS).read_bytes()
    assert [e["step"] for e in result.history if "loss" in e] == list(range(2, 121, 2))
    losses = [e["loss"] for e in result.history if "loss" in e]
    assert losses[-1] < 0.8 * losses[0]  # it learns


def latest_whole(folder):
    """Step of the newest checkpoint that is finished; 0 without one. The state is written last, and may be half there.

    Not by `latest_complete`: it removes broken checkpoints, which here are those that are being written.
    """
    steps = [0]
    for file in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            steps.append(json.loads(file.read_text())["global_step"])
        except (FileNotFoundError, json.JSONDecodeError):  # rotated away, or not yet whole
            continue
    return max(steps)


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
    job = make_job(target_modules=["q_proj", "qq_proj", "fancy"])
    with pytest.raises(ModelError) as caught:
        run(ARM, job)
    text = str(caught.value)
    assert "'qq_proj' matches nothing (did you mean 'q_proj'?)" in text and "'fancy' matches nothing" in text
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert name in text.split("Linear modules of this model:")[1]


def test_target_modules_found(make_job):
    job = make_job()
    model = load_base_model(job.base, job.settings)
    assert len(check_target_modules(model, ["q_proj"])) == 2


def test_only_lora_trains(make_job):
    job = make_job()
    model = add_lora(load_base_model(job.base, job.settings), job.settings)
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())


def test_4_bit_base_trains(make_job):
    import bitsandbytes as bnb

    job = make_job(quantize_base="nf4", max_steps=4, eval_steps=4)
    model = load_base_model(job.base, job.settings)
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) == 14
    result = run(ARM, job)
    assert result.summary["steps"] == 4
    assert all(w.isfinite().all() for w in load_file(job.output / WEIGHTS).values())


def test_a_base_that_does_not_exist(make_job, tmp_path):
    from dataclasses import replace

    from trainers.settings import BaseReference

    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        run(ARM, replace(make_job(), base=BaseReference(str(tmp_path / "nowhere"))))
