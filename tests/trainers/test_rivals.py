"""Other ways of keeping what a base can do: LoRA from a part of W, a scaled update, replayed questions."""

from dataclasses import replace

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from db.files import write_jsonl
from evaluation.tasks import general
from pipelines import profile
from pipelines.check import parse_params
from pipelines.train import training_items
from probes import Evidence, judge
from tests.trainers.runs import history, interrupted
from tests.trainers.test_adapters import logits, watched
from tests.trainers.test_training import WEIGHTS, loss_of, weights
from trainers import TrainingError
from trainers.arms import baseline_lora, residual_lora
from trainers.arms.residual_lora import ResidualSettings, corda, lora_null
from trainers.run import LEDGER, run

ARM = residual_lora.ARM
STARTS = pytest.mark.parametrize("start", ["corda", "lora_null"])


@pytest.fixture
def residual_job(make_job, aqi_examples):
    def make(start="corda", checkpoints=None, **changes):
        job = make_job(checkpoints=checkpoints, **changes)
        settings = ResidualSettings(**job.settings.model_dump(), start=start)
        questions = [next(general.questions(seed, held_out=False)) for seed in range(24)]
        return replace(job, settings=settings, texts=[(f"{prompt} {answer}", True) for _, prompt, answer in questions])

    return make


def test_corda_starts_where_peft_does():
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Linear(24, 16)), torch.randn(1, 200, 24) @ torch.randn(24, 24)
    w, c = net[0].weight.detach().double(), (x[0].mT @ x[0]).double() / 200
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm")
    )
    preprocess_corda(net, config, run_model=lambda: net(x))
    residual = get_peft_model(net, config).base_model.model[0].base_layer.weight
    b, a = corda(w, c, 4)
    assert (b.shape, a.shape) == ((16, 4), (4, 24))
    torch.testing.assert_close(b @ a, w - residual.double(), rtol=1e-3, atol=1e-5)


def test_lora_null_starts_as_w_on_the_directions_that_c_has_least_of():
    torch.manual_seed(0)
    w, axes = torch.randn(16, 24).double(), torch.linalg.qr(torch.randn(24, 24).double())[0]
    b, a = lora_null(w, axes @ torch.diag(torch.arange(24.0).double() + 1) @ axes.mT, 4)
    torch.testing.assert_close(b @ a, w @ axes[:, :4] @ axes[:, :4].mT)
    torch.testing.assert_close(b.mT @ b, a @ a.mT)  # balanced


@STARTS
def test_it_starts_as_the_base_and_what_is_saved_fits_the_untouched_base(residual_job, start):
    job, seen = residual_job(start), {}
    said = run(watched(seen, ARM), job)
    base = AutoModelForCausalLM.from_pretrained(job.base.location, dtype=torch.float32)
    plain = logits(base)
    loaded = logits(PeftModel.from_pretrained(base, str(job.output)))
    torch.testing.assert_close(seen["start"], plain, rtol=0, atol=1e-4)
    assert torch.equal(seen["off"], plain)
    torch.testing.assert_close(loaded, seen["end"], rtol=0, atol=1e-4)
    assert (loaded - plain).abs().max() > 0.1
    assert said["final_eval_loss"] == pytest.approx(loss_of(job), rel=1e-4)
    assert said["final_eval_loss"] == pytest.approx([e for e in history(job) if "eval_loss" in e][-1]["eval_loss"])
    saved = load_file(job.output / WEIGHTS)
    assert {w.shape[0] for n, w in saved.items() if "lora_A" in n} == {8}
    assert 2 * said["trainable_parameters"] == sum(w.numel() for w in saved.values())


@STARTS
def test_it_goes_on_to_the_same_bits(residual_job, tmp_path, start):
    undisturbed = residual_job(start)
    run(ARM, undisturbed)
    job = residual_job(start, checkpoints=tmp_path / "checkpoints")
    interrupted(ARM, job, {}, "on_step_end", 6)
    assert run(ARM, job)["resumed_from_step"] == 4
    assert weights(job) == weights(undisturbed)
    verdict = judge(Evidence.read(job.output / LEDGER))
    assert verdict.as_claimed and verdict.diagnosis == "equals_shadow"


def test_what_it_cannot_start_from(residual_job):
    with pytest.raises(TrainingError, match="residual_lora: expected texts of the base, got none"):
        run(ARM, replace(residual_job(), texts=()))
    with pytest.raises(TrainingError, match=r"train\.rank: expected at most 64, as wide as .*, got 65"):
        run(ARM, residual_job(rank=65))


def test_the_update_is_scaled_before_it_is_saved_and_evaluated(make_job):
    whole, half = make_job(max_steps=4), make_job(max_steps=4, scale_update=0.5)
    run(baseline_lora.ARM, whole)
    said = run(baseline_lora.ARM, half)
    full = load_file(whole.output / WEIGHTS)
    for name, weight in load_file(half.output / WEIGHTS).items():
        assert torch.equal(weight, full[name] * (0.5 if "lora_B" in name else 1.0))
    assert said["final_eval_loss"] == pytest.approx(loss_of(half), rel=1e-4)


@pytest.fixture
def raw():
    return yaml.safe_load(profile.compose("preserve"))


def test_replay_is_a_share_of_questions_that_the_suite_cannot_ask(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    row = {"id": "1", "task": "aqi", "prompt": "Q", "completion": "A", "truth": {}}
    write_jsonl(tmp_path / "data/train.jsonl", [row] * 40)
    params = parse_params(raw)
    settings, template = params.train_for("replay"), params.prompt.template
    items = training_items(settings, template, 0)
    own, replayed = items[:40], items[40:]
    assert own == training_items(params.train_for("baseline_lora"), template, 0)
    assert len(replayed) == 20 and replayed != training_items(settings, template, 1)[40:]
    head, tail = template.split("{prompt}")
    for prompt, answer in replayed:
        assert answer and not general.is_held_out(prompt.removeprefix(head).removesuffix(tail))
