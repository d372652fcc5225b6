"""Warm-ups, intervals, regularizers and the log: what happens at which step, counted."""

import json

import pytest
import torch

from grit import GRITManager, GritOptimizer
from tests.grit import nets
from tests.grit.nets import backward, covariances, of_kind, quick, train, trainable

R = 6


def start(dtype=torch.float32, lr=0.01, log_file=None, **changes):
    model = nets.lora(r=R, outputs=7, dtype=dtype)
    manager = GRITManager(model, quick(**{"mode": "adamw", **changes}), log_file=log_file)
    return model, manager, GritOptimizer(torch.optim.AdamW(trainable(model), lr, weight_decay=0.0), manager)


def inverted_at(model, optimizer, steps):
    """Train; the steps at which factors were inverted."""
    at, curvature = [], optimizer.manager.curvature
    for i in range(steps):
        before = curvature.inversions
        train(model, optimizer, 1, i)
        at += [i] * (curvature.inversions - before)
    return at


# Intervals


def test_a_factor_that_waits_for_samples_is_inverted_as_soon_as_it_has_them():
    model, manager, optimizer = start(kfac_update_freq=50, kfac_min_samples=100)
    assert inverted_at(model, optimizer, 3) == [0] and manager.curvature.ready_layers() == 0
    assert inverted_at(model, optimizer, 5) == [0] and manager.curvature.ready_layers() == 3  # with 128 tokens


def test_eigenbases_are_taken_up_when_the_warmup_is_over_and_counted_from_there():
    model, manager, optimizer = start(mode="eigen_adamw", ng_warmup_steps=3, kfac_update_freq=4)
    assert inverted_at(model, optimizer, 3) == []
    assert torch.equal(manager.curvature.states[0]["q_a"][0], torch.eye(R))
    assert inverted_at(model, optimizer, 6) == [0, 4]
    assert not torch.equal(manager.curvature.states[0]["q_a"][0], torch.eye(R))


def test_what_a_spectrum_says_is_so():
    model, manager, optimizer = start(torch.float64, log_top_eigs=R)
    train(model, optimizer, 3)
    record = of_kind(manager.history, "spectra")[-1]
    for name, (*covs, _) in covariances(manager).items():
        entry = record["layers"][name]
        assert (entry["r"], entry["k"], entry["samples"]) == (R, R, 96.0)
        for side, cov in zip("ag", covs, strict=True):
            values = torch.linalg.eigvalsh(cov).flip(0)
            share = values / values.sum()
            assert entry[f"eigenvalues_{side}"] == pytest.approx(values.tolist(), rel=1e-8)
            assert entry[f"condition_{side}"] == pytest.approx(float(values[0] / values[-1]), rel=1e-6)
            assert entry[f"effective_rank_{side}"] == pytest.approx(float(torch.exp(-(share * share.log()).sum())))
            assert entry[f"damping_share_{side}"] == pytest.approx(1e-3)


# Reprojection


def test_an_interval_of_zero_reprojects_at_the_end_only():
    model, manager, optimizer = start(reprojection="balanced", rank_adaptation_threshold=0.5, reprojection_freq=0)
    train(model, optimizer, 5)
    assert [r["step"] for r in of_kind(manager.history, "reprojection")] == []
    manager.finish(optimizer)
    assert [r["step"] for r in of_kind(manager.history, "reprojection")] == [5]
    assert all(p.rank < R for p in manager.pairs())


# Regularizers


def autograd_penalty(model, manager):
    """λ_kfac·[tr(AᵀΣ_gA) + tr(BΣ_aBᵀ)] + λ_reproj·[‖(I−P_a)A‖² + ‖B(I−P_g)‖²] and its gradients by autograd."""
    total, config, found = 0.0, manager.config, covariances(manager)
    for pair in manager.pairs():
        cov_a, cov_g, _ = found[pair.name]
        rest = []
        for cov in (cov_a, cov_g):
            vectors = torch.linalg.eigh(cov)[1][:, -config.reprojection_k :]
            rest.append(torch.eye(R, dtype=cov.dtype) - vectors @ vectors.mT)
        curvature = torch.trace(pair.a.mT @ cov_g @ pair.a) + torch.trace(pair.b @ cov_a @ pair.b.mT)
        outside = (rest[0] @ pair.a).square().sum() + (pair.b @ rest[1]).square().sum()
        total = total + config.lambda_kfac * curvature + config.lambda_reproj * outside
    return float(total.detach()), torch.autograd.grad(total, trainable(model))


@pytest.mark.parametrize(
    ("curvature", "outside", "step", "share"),
    [(300.0, 0.0, 5, 1.0), (0.0, 0.7, 5, 1.0), (300.0, 0.7, 7, 1.0), (300.0, 0.7, 2, 0.4), (300.0, 0.7, 0, 0.0)],
)
def test_the_regularizers_gradient_is_autograds_raised_over_a_warmup_and_preconditioned_like_the_losss(
    curvature, outside, step, share
):
    changes = {"lambda_kfac": curvature, "lambda_reproj": outside, "reprojection_k": 2, "grafting": False}
    model, manager, optimizer = start(torch.float64, lr=0.0, **changes, regularizer_warmup_steps=5)
    manager.step = step
    backward(model)
    raw = {p: p.grad.clone() for p in trainable(model)}
    optimizer.step()
    value, extra = autograd_penalty(model, manager)
    assert manager.metrics()["grit/regularizer"] == pytest.approx(share * value, rel=1e-10)
    assert min(float(e.norm()) for e in extra) > 1e-2
    whole = {p: raw[p] + share * e for p, e in zip(trainable(model), extra, strict=True)}
    found = covariances(manager)
    for pair in manager.pairs():
        inverse_a, inverse_g = (
            torch.linalg.inv(c + 1e-3 * torch.trace(c) / R * torch.eye(R, dtype=c.dtype)) for c in found[pair.name][:2]
        )
        torch.testing.assert_close(pair.a.grad, inverse_g @ whole[pair.a], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(pair.b.grad, whole[pair.b] @ inverse_a, rtol=1e-8, atol=1e-9)


# Log file


def refuse(name):
    raise AssertionError(f"not JSON: {name}")


@pytest.mark.parametrize("modules", [[], ["head", "second"]])
def test_every_line_of_the_log_is_json_with_nan_inside_too(modules, tmp_path):
    file = tmp_path / "deep" / "grit.jsonl"
    changes = {"log_eig_heatmaps_modules": modules, "reprojection": "balanced", "rank_adaptation_threshold": 0.8}
    model, manager, optimizer = start(log_file=file, log_eig_heatmaps=True, reprojection_freq=2, **changes)
    train(model, optimizer, 3)
    train(model, optimizer, 2, scale=float("nan"))
    manager.add_record({"kind": "odd", "values": [float("nan"), {"deep": [-float("inf"), 1.5]}], "text": 'ü"\n'})
    manager.finish()
    manager.close()
    lines = [json.loads(line, parse_constant=refuse) for line in file.read_text(encoding="utf-8").splitlines()]
    assert lines == manager.history
    assert [r["gradient_norm"] for r in of_kind(lines, "skipped")] == ["nan", "nan"]
    odd = {"step": 5, "kind": "odd", "values": ["nan", {"deep": ["-inf", 1.5]}], "text": 'ü"\n'}
    assert of_kind(lines, "odd") == [odd]
    assert {"effect", "spectra", "skipped", "reprojection", "odd", "final"} == {r["kind"] for r in lines}
    assert [r["step"] for r in lines] == sorted(r["step"] for r in lines)
    *before, final = lines
    assert final["kind"] == "final" and final["skipped_steps"] == 2
    assert not any("factors" in record for record in before)
    names = modules or ["first", "second", "head"]
    assert sorted(final["factors"]) == sorted(nets.PREFIX + name for name in names)
    for name, said in final["factors"].items():
        cov_a, cov_g, _ = covariances(manager)[name]
        assert torch.equal(torch.tensor(said["cov_a"]), cov_a) and torch.equal(torch.tensor(said["cov_g"]), cov_g)
