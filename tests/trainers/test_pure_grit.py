"""The arm pure_grit: the baseline's path with GRIT inside the optimizer's step."""

import json

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trainers import baseline_lora, pure_grit
from trainers.common import run

pytestmark = pytest.mark.slow
GRIT = {"min_lora_rank": 1, "kfac_min_samples": 1, "grit_cov_update_freq": 1, "kfac_update_freq": 2, "log_freq": 4}


def test_it_differs_from_the_baseline_in_the_optimizer_only(make_job):
    jobs = {name: make_job(grit=GRIT if name == "grit" else None) for name in ("grit", "baseline")}
    results = {"grit": run(pure_grit.ARM, jobs["grit"]), "baseline": run(baseline_lora.ARM, jobs["baseline"])}
    first = {name: next(e for e in r.history if "loss" in e) for name, r in results.items()}
    # Two steps in, of which the first saw the same weights and the same items.
    assert first["grit"]["loss"] == pytest.approx(first["baseline"]["loss"], rel=0.05)
    assert results["grit"].summary["steps"] == results["baseline"].summary["steps"] == 12
    said = results["grit"].summary["grit"]
    assert said["effective"] and set(said["capture"].values()) == {"hooks"} and said["inversions"] > 3
    output = jobs["grit"].output
    for name in ("fisher_spectra.png", "ranks.png"):
        assert (output / name).read_bytes()[:4] == b"\x89PNG"
    kinds = [json.loads(line)["kind"] for line in (output / "grit_log.jsonl").open()]
    assert kinds[-1] == "final" and "effect" in kinds
    weights = {name: load_file(job.output / "adapter_model.safetensors") for name, job in jobs.items()}
    assert any(w.shape != weights["baseline"][n].shape or not w.equal(weights["baseline"][n])
               for n, w in weights["grit"].items())  # fmt: skip


def test_the_loss_it_reports_is_that_of_the_adapter_it_saves(make_job):
    job = make_job(grit={**GRIT, "rank_adaptation_threshold": 0.6})
    result = run(pure_grit.ARM, job)
    assert result.summary["grit"]["mean_rank"] < 4
    base = AutoModelForCausalLM.from_pretrained(job.base.location)
    model = PeftModel.from_pretrained(base, str(job.output)).eval()
    saved = load_file(job.output / "adapter_model.safetensors")
    assert sum(w.numel() for w in saved.values()) == result.summary["trainable_parameters"]
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == sum(w.numel() for w in saved.values())
    last = [e["eval_loss"] for e in result.history if "eval_loss" in e][-1]
    assert result.summary["final_eval_loss"] != last  # before and after ranks have shrunk


def test_a_run_too_short_for_any_factor_keeps_its_adapter_and_says_so(make_job, capsys):
    job = make_job(max_steps=2, grit={**GRIT, "kfac_min_samples": 10**9, "log_fisher_spectrum": False})
    result = run(pure_grit.ARM, job)
    assert result.summary["grit"]["effective"] is False
    assert "no factor is ready" in result.summary["grit"]["effect"]["reason"]
    assert (job.output / "adapter_model.safetensors").is_file()
