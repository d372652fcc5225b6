"""The arms on Unsloth, real on its CPU backend; a double plays its kernels on a GPU.

Unsloth patches TRL for the whole process and takes 10 s to import, so all jobs share few subprocesses.
"""

import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from probes import Evidence, judge
from tests.trainers import runs
from tests.trainers.runs import ROOT
from tests.trainers.test_training import WEIGHTS
from trainers import TrainingError
from trainers.arms import hybrid_grit, unsloth_lora
from trainers.models import add_lora, load_base_model
from trainers.run import LEDGER, run

GRIT = {"min_lora_rank": 1, "kfac_min_samples": 1, "grit_cov_update_freq": 1, "kfac_update_freq": 2, "log_freq": 4}
MLP = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def in_own_process(jobs, folder, code=0):
    (folder / "cwd").mkdir(exist_ok=True)
    file, log = folder / "jobs", folder / "log"
    file.write_bytes(pickle.dumps(jobs))
    # HF_HUB_OFFLINE is the arm's to set: nobody may ask for the network.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "UNSLOTH_"))} | {"PYTHONPATH": str(ROOT)}
    with log.open("w") as out:
        command = [sys.executable, "-m", "tests.trainers.runs", "hybrid", str(file)]
        done = subprocess.run(command, cwd=folder / "cwd", env=env, stdout=out, stderr=out, timeout=240, check=False)
    assert done.returncode == code, log.read_text()[-4000:]
    return pickle.loads(file.with_suffix(".seen").read_bytes()) if code == 0 else None


@pytest.fixture(scope="module")
def jobs(make_job):
    few = {"max_steps": 4, "eval_steps": 4}
    mlp = {"grit": GRIT, "target_modules": MLP, **few}
    return {
        "lora": (make_job(), False, {}),
        "plain": (make_job(grit=GRIT), False, {}),
        "checkpointing": (make_job(grit=GRIT, gradient_checkpointing=True, **few), False, {}),
        "fused": (make_job(**mlp), True, {}),
        "unfused": (make_job(unsloth_fused_lora=False, **mlp), True, {}),
        "never fused": (make_job(**mlp), False, {}),
        "nf4": (make_job(grit=GRIT, quantize_base="nf4", **few), False, {}),
    }


@pytest.fixture(scope="module")
def seen(jobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    found = in_own_process([(name, *what) for name, what in jobs.items()], folder)
    return {**found, "litter": sorted(p.name for p in (folder / "cwd").iterdir())}


def adapter(jobs, name):
    return (jobs[name][0].output / WEIGHTS).read_bytes()


def test_it_trains_with_unsloths_trainer_and_grit(seen):
    plain = seen["plain"]
    said = plain["summary"]
    assert plain["classes"][1] == "grit.trainer.GritMixin" and "_make_cpu_sft_trainer" in plain["classes"][2]
    assert said["unsloth"] == {"version": "2026.10.9", "device": "cpu", "fused_methods": 0}
    assert said["steps"] == 12 and said["grit"]["effective"] and set(said["grit"]["capture"].values()) == {"hooks"}
    losses = [e["loss"] for e in plain["history"] if "loss" in e]
    assert losses[-1] < losses[0]
    assert plain["optimizer"] == "adamw_torch"  # as the settings say; Unsloth alone would take another
    assert seen["litter"] == [] and plain["network"] == []


def test_without_grit_it_trains_as_the_baseline_does(seen, jobs, adapter_dir):
    """On a CPU, where Unsloth fuses nothing: an arm of plain AdamW, of which the probe says so."""
    lora, baseline = seen["lora"], json.loads((adapter_dir / "loss_history.json").read_text())
    assert "_make_cpu_sft_trainer" in lora["classes"][0] and lora["summary"]["unsloth"]["fused_methods"] == 0
    curves = [[e["loss"] for e in entries if "loss" in e] for entries in (lora["history"], baseline)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    verdict = judge(Evidence.read(jobs["lora"][0].output / LEDGER))
    assert verdict.verdict == "no_effect" and verdict.as_claimed, verdict.reason


def test_a_and_b_start_as_in_the_other_arms(seen, jobs):
    job = jobs["plain"][0]
    model = load_base_model(job.base, job.settings)
    set_seed(job.seed)
    model = add_lora(model, job.settings)
    start = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert start.keys() == seen["plain"]["start"].keys()
    assert all(torch.equal(p, seen["plain"]["start"][n]) for n, p in start.items())


@pytest.mark.full
def test_killed_and_resumed_equals_undisturbed(seen, jobs, make_job, tmp_path):
    job = make_job(grit=GRIT, checkpoints=tmp_path / "checkpoints")
    in_own_process([("killed", job, False, {}, "on_save", 8)], tmp_path, code=-signal.SIGKILL)
    assert not (job.output / WEIGHTS).exists()
    resumed = in_own_process([("resumed", job, False, {})], tmp_path)["resumed"]
    assert resumed["summary"]["resumed_from_step"] == 8
    assert (job.output / WEIGHTS).read_bytes() == adapter(jobs, "plain")


def test_statistics_count_once_under_unsloths_checkpointing(seen):
    """Its forward hooks run twice a step."""
    plain, checkpointing = seen["plain"], seen["checkpointing"]
    assert plain["forward"] == 12 and checkpointing["forward"] == 2 * 4
    assert plain["tokens"][0] > 0 and checkpointing["tokens"][0] == plain["tokens"][0]
    assert set(checkpointing["summary"]["grit"]["capture"].values()) == {"hooks"}
    first = {n: next(e["loss"] for e in s["history"] if "loss" in e) for n, s in seen.items() if n != "litter"}
    assert first["checkpointing"] == pytest.approx(first["plain"], rel=1e-3)


def test_layers_behind_fused_kernels_get_gradient_statistics(seen):
    fused = seen["fused"]["summary"]
    capture = fused["grit"]["capture"]
    assert len(capture) == 2 * len(MLP)
    gradients = {n for n, kind in capture.items() if kind == "gradients"}
    assert gradients == {n for n in capture if n.endswith(("gate_proj", "up_proj", "down_proj"))}
    assert {kind for n, kind in capture.items() if n not in gradients} == {"hooks"}
    assert fused["grit"]["effective"] and fused["unsloth"]["fused_methods"] == 2
    (line,) = [line for line in seen["fused"]["log"] if "using gradient statistics" in line]
    assert "6 layers have gradients but their hooks reported nothing" in line
    assert all(n in line for n in gradients) and "q_proj" not in line


def test_fusing_can_be_switched_off(seen, jobs):
    said = seen["unfused"]["summary"]
    assert said["unsloth"]["fused_methods"] == 0 and set(said["grit"]["capture"].values()) == {"hooks"}
    assert not [line for line in seen["unfused"]["log"] if "using gradient statistics" in line]
    assert adapter(jobs, "unfused") == adapter(jobs, "never fused") != adapter(jobs, "fused")


def test_a_4_bit_base_trains(seen, jobs):
    assert seen["nf4"]["summary"]["steps"] == 4
    assert all(w.isfinite().all() for w in load_file(jobs["nf4"][0].output / WEIGHTS).values())


# What needs no Unsloth


def small_lora():
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=MLP, r=2, init_lora_weights=False))
    return model.eval()


def test_undoing_reaches_every_place_that_unsloth_fuses(monkeypatch):
    llama = types.SimpleNamespace(original_apply_qkv=object(), original_apply_o=object())
    for name in ("unsloth", "unsloth.models", "unsloth.models.llama"):
        monkeypatch.setitem(sys.modules, name, llama)
    model, ids = small_lora(), torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    tiled, partial = (m.mlp for m in model.base_model.model.model.layers)
    tiled._unsloth_forward = types.MethodType(runs.apply_lora_mlp, tiled)
    tiled.forward = types.MethodType(lambda self, x: self._unsloth_forward.__get__(self, type(self))(x), tiled)
    partial.forward = types.MethodType(functools.partial(runs.apply_lora_mlp), partial)
    attention = model.base_model.model.model.layers[0].self_attn
    attention.apply_qkv = attention.apply_o = runs.apply_lora_mlp
    calls = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    torch.testing.assert_close(model(ids).logits, expected)  # the double computes the same
    assert not [c for c in calls if "mlp" in c]
    calls.clear()
    assert unsloth_lora.unfuse_lora(model) == 4
    assert (attention.apply_qkv, attention.apply_o) == (llama.original_apply_qkv, llama.original_apply_o)
    assert torch.equal(model(ids).logits, expected)
    assert len([c for c in calls if "mlp" in c]) == 6 and "forward" in vars(tiled)  # tiling stays
    assert unsloth_lora.unfuse_lora(model) == 0


def test_a_place_that_is_not_known_is_named(monkeypatch):
    model = small_lora()
    layer = model.base_model.model.model.layers[1]
    layer.mlp.apply_new = runs.apply_lora_mlp
    with pytest.raises(TrainingError, match=r"found them in 1 other places: .*layers\.1\.mlp\.apply_new"):
        unsloth_lora.unfuse_lora(model)
    del layer.mlp.apply_new

    def unsloth_forward(self, x):
        return x

    monkeypatch.setattr(type(layer.mlp.up_proj), "forward", unsloth_forward)  # as unsloth_zoo's compiler does
    with pytest.raises(TrainingError, match=r"in 10 other places: .*q_proj \(Linear\.forward\)"):
        unsloth_lora.unfuse_lora(model)


def test_without_unsloth_it_says_how_to_install_it(make_job, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", None)
    for name in ("UNSLOTH_DISABLE_STATISTICS", "UNSLOTH_COMPILE_LOCATION", "UNSLOTH_BLOCK_COMPILE"):
        monkeypatch.setenv(name, "1")  # else the arm's own would stay
    with pytest.raises(TrainingError, match=r"needs Unsloth, .*--no-deps -r requirements-unsloth\.lock"):
        run(hybrid_grit.ARM, make_job(grit=GRIT))


def test_labels_that_do_not_fit_the_completion_are_refused(make_job, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    job = make_job(grit=GRIT)

    def forgetful(base, settings, **kwargs):
        return types.SimpleNamespace(
            data_collator=lambda rows: {"labels": torch.tensor([row["input_ids"] for row in rows])},
            train_dataset=kwargs["train_dataset"],
        )

    arm = replace(
        unsloth_lora.ARM, prepare=None, load_model=load_base_model, add_adapter=add_lora,
        make_trainer=lambda settings, **kwargs: unsloth_lora.make_trainer(settings, forgetful, **kwargs),
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"loss on the completion's \d+ tokens of the first example, got it on"):
        run(arm, job)
