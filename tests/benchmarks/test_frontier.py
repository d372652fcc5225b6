"""The bench of methods: what is run when, that no run is repeated, and rivals that do what their formulas say."""

import json

import pytest
import torch

from benchmarks import _rivals, frontier
from probes.shadow import Shadow, shadow_options
from trainers.models import add_lora, load_base_model


def loss_of(run):
    """A made-up loss: AdamW's best rate is the last of three, muon is far behind."""
    own = run["settings"]
    worse = abs(own["rate"] / 5.1e-3 - 1) + abs(own["alpha"] / 128 - 1) + own["beta1"] + own["warmup"]
    return (worse / 10 + (1.2 if run["method"] == "muon" else 1)) / run["horizon"] ** 0.1 + run["seed"] * 1e-4


def row_of(run, limit=None):
    return {**run, "loss": loss_of(run), "pruned": False, "loss_at_a_third": 1.0, "seconds_a_step": 0.1}


def finish(horizons, methods, rows, seeds=frontier.SEEDS):
    while waiting := list(frontier.runs(horizons, methods, rows, seeds)):
        rows |= {frontier.key(run): row_of(run) for run in waiting}
    return list(rows.values())


def test_every_method_has_the_same_budget():
    methods = ["adamw", "grit", "soap", "muon"]
    rows = finish([150, 300, 600], methods, {})
    count = {}
    for row in rows:
        what = row["method"], row["kind"], row["horizon"]
        count[what] = count.get(what, 0) + 1
    for name in methods:
        tunes = (17,) if name == "muon" else (28, 31)  # too far for more than its best on further seeds
        assert count[name, "tune", 150] in tunes and count[name, "compare", 150] == 5
        for horizon, tunes in ((300, 8), (600, 9)):
            assert (count.get((name, "tune", horizon), 0) in (tunes, tunes - 1)) == (name != "muon")
            assert count.get((name, "compare", horizon), 0) == (0 if name == "muon" else 5)
    assert [count[what] for what in count if what[2] in (112, 225, 450)] == [6, 5, 6, 5, 6, 5]
    assert {row["seed"] for row in rows if row["kind"] == "tune"} == {100, 101, 102}
    best = [row for row in rows if row["method"] == "adamw" and row["kind"] == "compare" and row["horizon"] == 150]
    assert all(row["settings"] == {"alpha": 128, "beta1": 0.7, "warmup": 0.0, "rate": 5.1e-3} for row in best)


def test_runs_that_are_there_are_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "RESULTS", tmp_path)
    monkeypatch.setattr(frontier.tempfile, "gettempdir", lambda: str(tmp_path))
    made = []

    def die_after(number):
        def train(run, limit):
            if len(made) == number:
                raise KeyboardInterrupt
            made.append(frontier.key(run))
            return row_of(run)

        return train

    class Here:
        """In the place of a pool: no process of its own."""

        def __init__(self, *_, **__):
            pass

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

        def submit(self, work, *given):
            self.result = lambda: work(*given)
            return self

    monkeypatch.setattr(frontier, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(frontier, "train", die_after(7))
    with pytest.raises(KeyboardInterrupt):
        frontier.work([150], ["adamw"])
    with frontier._file().open("a") as file:
        file.write('{"method": "ada')  # cut short by the kill
    monkeypatch.setattr(frontier, "train", die_after(-1))
    frontier.work([150], ["adamw"])
    assert len(made) == len(set(made)) == len(frontier.read_rows()) == 36


def test_steps_are_read_off_the_curve():
    curve = {100: 0.6, 200: 0.5, 400: 0.4}
    for loss, steps in ((0.5, 200), (0.55, 2**0.5 * 100), (0.7, 50), (0.3, 800)):
        assert frontier.steps_to(loss, curve) == pytest.approx(torch.tensor(float(steps)).log().item())
    assert frontier.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 2.4841, 2 + 2.4841), abs=1e-3)


def test_the_report_has_ratios_and_who_is_ahead(monkeypatch):
    rows = {}
    finish([75, 150, 300], ["adamw", "grit", "soap", "muon"], rows)
    finish([75, 150, 300], ["adamw", "grit"], rows, frontier.MORE_SEEDS)
    monkeypatch.setattr(frontier, "plot", lambda *_: None)
    found = {}
    monkeypatch.setattr(frontier, "write", lambda name, title, **facts: found.update(json.loads(json.dumps(facts))))
    frontier.report(rows)
    mean = {(line["method"], line["horizon"]): line["loss"][0] for line in found["table"]}
    assert {line["seeds"] for line in found["table"] if line["method"] in ("adamw", "grit")} == {10}
    soap = next(line for line in found["table"] if (line["method"], line["horizon"]) == ("soap", 150))
    assert soap["seeds"] == 5 and soap["to_adamw"][1] == pytest.approx(soap["to_adamw"][2])  # seed by seed
    assert set(found["steps_ratio"]) == {"75", "150", "300"} and found["seeds"] == [0, 1, 2, 3, 4]
    expected = {h: mean["grit", h] - mean["adamw", h] for h in (75, 150, 300) if mean["adamw", h] < mean["grit", h]}
    assert found["rivals_ahead"].get("adamw", {}) == {str(h): pytest.approx(by) for h, by in expected.items()}


# Rivals


def test_lora_one_starts_down_the_gradient(make_job):
    job = make_job()
    model = add_lora(load_base_model(job.base, job.settings), job.settings)
    ids = torch.arange(3, 43)[None]
    batch = {"input_ids": ids, "labels": ids}
    weight = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").base_layer.weight
    before, kept = model(**batch).loss.item(), weight.clone()
    falls = []
    for gamma in (1e5, 2e5):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)
        _rivals.spectral_start(model, batch, gamma)
        falls.append(before - model(**batch).loss.item())
    assert falls[1] > 0 and falls[0] == pytest.approx(2 * falls[1], rel=0.1)  # to first order
    assert torch.equal(weight, kept) and not weight.requires_grad


@pytest.mark.parametrize("rule", [(True, False, False), (False, True, False), (True, True, False), (True, True, True)])
def test_the_probes_yardstick_follows_the_optimizers_step_rule(rule):
    """The shadow, for two tensors of one size of which one has fewer gradients, against AheadAdamW."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for _ in range(2)]
    optimizer = _rivals.AheadAdamW(weights, 0.01, (0.8, 0.95), 1e-8, 0.1, *rule)
    optimizer.step_rules = lambda parameters: [optimizer.rule] * len(parameters)
    shadow = Shadow(weights)
    for step in range(6):
        weights[0].grad = torch.randn_like(weights[0])
        weights[1].grad = torch.randn_like(weights[1]) if step != 2 else None
        befores = shadow.layout.stack(weights)
        gradients = shadow.layout.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in weights])
        known = [p.grad is not None for p in weights]
        options = shadow_options(optimizer, weights)
        delta = shadow.layout.views(shadow.update(gradients, known, options, befores))
        before = [p.detach().clone() for p in weights]
        optimizer.step()
        for p, was, told, there in zip(weights, before, delta, known, strict=True):
            if there:
                real = p.detach() - was
                assert float((real - told.view(3, 4)).norm() / real.norm()) < 1e-4
