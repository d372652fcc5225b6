"""A model held to its base while it is trained."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from probes import Evidence, judge
from tests.conftest import TEMPLATE
from tests.trainers.runs import history, interrupted
from trainers import TrainingError, arms
from trainers.encode import encode_texts
from trainers.keeper import KL, STRENGTH, Keeper, batches, hold_out
from trainers.models import load_tokenizer
from trainers.run import LEDGER, build, run

WORDS = ("river stone", "apple", "maple window garden", "7 and 8", "candle", "a forest of bridges", "silver 12.5 kg")
TEXTS = [(f"{TEMPLATE.format(prompt=f'Repeat: {word} {i}')}{word} {i}", True) for i in range(6) for word in WORDS]
METHODS = {
    "distill": {"method": "distill", "strength": 2.0, "rows": 3, "kl": 0.02},
    "kfac": {"method": "kfac", "strength": 5.0, "rows": 3, "kl": 0.02},
    "activations": {"method": "activations", "strength": 30.0},
}


@pytest.fixture
def held(make_job):
    def make(method="none", **changes):
        own = METHODS[method] if method in METHODS else {"method": method}
        return replace(make_job(preserve=own, **changes), texts=TEXTS)

    return make


def keeper_of(job):
    trainer, *_ = build(arms.load("baseline_lora"), job)
    ids = encode_texts(load_tokenizer(job.base), job.texts, job.settings.max_length)
    return Keeper(trainer, job.settings, *hold_out(ids), job.seed)


def by_hand(trainer, texts):
    """KL(base ‖ tuned), mean over all tokens, text by text."""
    total, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([text])
        with torch.no_grad(), trainer.model.disable_adapter():
            base = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        tuned = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total = total + (base.exp() * (base - tuned)).sum()
        tokens += len(text) - 1
    return total / tokens


def move(trainer):
    torch.manual_seed(1)
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.05)


@pytest.mark.parametrize("method", ["distill", "kfac"])
@pytest.mark.parametrize("arm", ["baseline_lora", "pure_grit"])
def test_a_run_that_was_cut_short_goes_on_to_the_same_bits(held, method, arm, tmp_path):
    grit = {"grit": {"kfac_min_samples": 1, "kfac_update_freq": 2, "min_lora_rank": 1}} if arm == "pure_grit" else {}
    whole, job = held(method, **grit), replace(held(method, **grit), checkpoints=tmp_path)
    run(arms.load(arm), whole)
    interrupted(arm, job, {}, "on_step_end", 6)
    assert run(arms.load(arm), job)["resumed_from_step"] == 4
    curves = [[(e["step"], e.get("loss"), e.get(KL), e.get(STRENGTH)) for e in history(j)] for j in (job, whole)]
    assert curves[0] == curves[1]
    first, second = (j.output / "adapter_model.safetensors" for j in (whole, job))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_has_the_gradient_of_the_task_and_once_that_of_kl(held, accumulation):
    changes = {"gradient_accumulation": accumulation, "batch_size": 4 // accumulation}
    found = {}
    for method in ("none", "distill"):
        trainer, *_ = build(arms.load("baseline_lora"), held(method, **changes))
        move(trainer)
        trainer.current_gradient_accumulation_steps, trainer.state.max_steps = accumulation, 12
        data = iter(trainer.get_train_dataloader())
        for _ in range(accumulation):
            trainer.training_step(trainer.model, next(data))
        found[method] = [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.model.zero_grad()
    keeper = keeper_of(held("distill", **changes))
    rows = keeper.rows_of(0)
    assert len(rows) == 3
    (2.0 * by_hand(trainer, rows)).backward()
    own = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    assert max(g.abs().max() for g in own) > 1e-4
    for task, both, of_kl in zip(found["none"], found["distill"], own, strict=True):
        torch.testing.assert_close(both - task, of_kl, atol=2e-6, rtol=1e-4)


def test_kl_is_measured_in_every_run_on_texts_that_no_loss_sees(held):
    keeper = keeper_of(held("none", max_steps=4, eval_steps=2))
    assert keeper.measure() == pytest.approx(0.0, abs=1e-7)
    move(keeper.trainer)
    assert keeper.measure() == pytest.approx(float(by_hand(keeper.trainer, keeper.held)), rel=1e-4)
    assert not {tuple(t) for t in keeper.held} & {tuple(t) for n in range(40) for t in keeper.rows_of(n)}
    job = held("none", max_steps=4, eval_steps=2)
    summary = run(arms.load("baseline_lora"), job)
    curve = {entry["step"]: entry[KL] for entry in history(job) if KL in entry}
    assert [*curve] == [2, 4] and summary["final_kl"] == curve[4] > 0


def test_it_holds(held):
    kl = {}
    for method in ("none", *METHODS):
        job = held(method, max_steps=30, save_steps=30, eval_steps=30)
        kl[method] = run(arms.load("baseline_lora"), job)["final_kl"]
    assert all(kl[method] < 0.6 * kl["none"] for method in METHODS), kl


def test_every_text_comes_once_before_one_comes_again_whatever_the_number_of_ranks(held):
    keeper = keeper_of(held("distill"))
    args, seen = keeper.trainer.args, []
    for step in range(len(keeper.texts) // 3):
        for ranks in (1, 2, 4):
            shares = []
            for rank in range(ranks):
                keeper.trainer.args = SimpleNamespace(world_size=ranks, process_index=rank)
                shares.append(keeper.share_of(step))
            assert sum(share for _, share in shares) == pytest.approx(ranks)
            assert {text for own, share in shares if share for text in own} == set(keeper.rows_of(step))
        seen += keeper.rows_of(step)
    keeper.trainer.args = args
    assert len(seen) == len(set(seen)) == len(keeper.texts) // 3 * 3


def test_where_logits_are_hidden_the_texts_cross_entropy_over_the_bases_is_the_loss(held):
    keeper = keeper_of(held("distill"))
    model = keeper.trainer.model
    move(keeper.trainer)
    (batch,) = batches(keeper.rows_of(0), keeper.pad, "cpu", 3)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    tuned = cross_entropy(model(**batch).logits[:, :-1].mT, labels[:, 1:])
    tuned.backward()
    with torch.no_grad(), model.disable_adapter():
        base = cross_entropy(model(**batch).logits[:, :-1].mT, labels[:, 1:])
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()

    def hide(module, args, kwargs, output):
        return output if "labels" in kwargs else SimpleNamespace(logits=None)

    with model.register_forward_hook(hide, with_kwargs=True):
        loss = keeper.divergence(model, batch, keeper.base_at(model, 0, batch))
        loss.backward()
    assert abs(tuned - base) > 0.01
    torch.testing.assert_close(loss.detach(), (tuned - base).detach(), atol=1e-5, rtol=1e-4)
    for want, p in zip(expected, (p for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(p.grad, want)


def test_the_strength_follows_a_target(held):
    keeper = keeper_of(held("distill"))
    keeper.trainer.state.max_steps = 100
    for kl, way in ((1.0, 1), (1e-6, -1)):
        before, keeper.kl = keeper.strength, None
        keeper.follow(kl, 0.02)
        assert (keeper.strength - before) * way > 0
    fixed = held("activations")
    run(arms.load("baseline_lora"), fixed)
    assert {entry[STRENGTH] for entry in history(fixed) if STRENGTH in entry} == {30.0}


@pytest.mark.parametrize("method", ["distill", "kfac"])
def test_the_added_gradient_is_part_of_the_loss_for_the_probe(held, method):
    job = held(method)
    run(arms.load("baseline_lora"), job)
    verdict = judge(Evidence.read(job.output / LEDGER))
    assert verdict.verdict == "no_effect" and verdict.as_claimed, verdict.reason
    assert any(STRENGTH in entry for entry in history(job))


def test_it_needs_texts_of_the_base(make_job):
    with pytest.raises(TrainingError, match="base_texts"):
        build(arms.load("baseline_lora"), make_job(preserve={"method": "distill"}))
