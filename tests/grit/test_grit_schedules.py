"""Warm-ups, intervals, regularisers and the log: what happens at which step, counted."""

import json

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from grit import GRITManager, GritOptimizer
from grit.schedule import LossTrend, ramp
from tests.grit import nets
from tests.grit.nets import trainable

R = 6


def lora(dtype=torch.float32):
    return nets.lora(r=R, outputs=7, dtype=dtype)


def quick(**changes):
    return nets.quick(**{"mode": "adamw", **changes})


def start(config, dtype=torch.float32, lr=0.01, **kwargs):
    model = lora(dtype)
    manager = GRITManager(model, config, **kwargs)
    return model, manager, GritOptimizer(torch.optim.AdamW(trainable(model), lr, weight_decay=0.0), manager)


def backward(model, i=0, n=32):
    generator = torch.Generator().manual_seed(100 + i)
    x, y = torch.randn(n, 8, generator=generator), torch.randn(n, 7, generator=generator)
    dtype = trainable(model)[0].dtype
    loss = F.mse_loss(model(x.to(dtype)), y.to(dtype))
    loss.backward()
    return float(loss.detach())


def train(model, optimizer, steps, losses=None):
    for i in range(steps):
        loss = backward(model, i)
        optimizer.manager.observe_loss(losses[i] if losses else loss)
        optimizer.step()
        optimizer.zero_grad()


def steps_of(manager, kind):
    return [r["step"] for r in manager.history if r["kind"] == kind]


def spy_on(manager, name):
    """The steps at which a method of the manager was called."""
    calls, original = [], getattr(manager, name)

    def called(*args, **kwargs):
        calls.append(manager.step)
        return original(*args, **kwargs)

    setattr(manager, name, called)
    return calls


# Intervals


def test_inversions_keep_their_interval_and_statistics_theirs():
    model, manager, optimizer = start(quick(kfac_update_freq=6, grit_cov_update_freq=4))
    calls = spy_on(manager, "update_and_invert_factors")
    sampled = []
    for i in range(20):
        assert manager.capture.active == (i % 4 == 0)
        backward(model, i)
        optimizer.step()
        optimizer.zero_grad()
        sampled.append(float(manager.states[0]["samples"][0]))
    assert calls == [0, 6, 12, 18]
    assert manager.inversions == 4
    assert sampled == [32.0 * (1 + i // 4) for i in range(20)]
    manager.close()


@pytest.mark.parametrize("mode", ["adamw", "eigen_adamw"])
def test_inverses_and_bases_stand_still_between_inversions(mode):
    model, manager, optimizer = start(quick(mode=mode, kfac_update_freq=3))
    names = ("inv_a", "inv_g") if mode == "adamw" else ("q_a", "q_g")
    seen = []
    for i in range(7):
        backward(model, i)
        optimizer.step()
        optimizer.zero_grad()
        seen.append([state[name].clone() for state in manager.states for name in names])
    changed = [not all(torch.equal(a, b) for a, b in zip(seen[i], seen[i - 1], strict=True)) for i in range(1, 7)]
    assert changed == [False, False, True, False, False, True]
    manager.close()


def test_a_factor_that_waits_for_samples_is_inverted_as_soon_as_it_has_them():
    model, manager, optimizer = start(quick(kfac_update_freq=50, kfac_min_samples=100))
    calls = spy_on(manager, "update_and_invert_factors")
    ready = []
    for i in range(8):
        backward(model, i)
        optimizer.step()
        optimizer.zero_grad()
        ready.append(manager.ready_layers())
    assert calls == [0, 3]  # 32, 64, 96, 128 tokens
    assert ready == [0, 0, 0, 3, 3, 3, 3, 3]
    manager.close()


def test_eigenbases_are_taken_up_when_the_warmup_is_over_and_counted_from_there():
    model, manager, optimizer = start(quick(mode="eigen_adamw", ng_warmup_steps=3, kfac_update_freq=4))
    rotated = []
    eye = torch.eye(R)
    for i in range(9):
        backward(model, i)
        optimizer.step()
        optimizer.zero_grad()
        rotated.append(not torch.equal(manager.states[0]["q_a"][0], eye))
    assert rotated == [False] * 3 + [True] * 6
    assert manager.inversions == 2  # at 3 and 7
    manager.close()


@pytest.mark.parametrize("spectra", [True, False])
def test_log_freq_is_obeyed_and_spectra_may_be_switched_off(spectra):
    model, manager, optimizer = start(quick(log_freq=4, log_fisher_spectrum=spectra, log_top_eigs=2))
    train(model, optimizer, 10)
    assert steps_of(manager, "effect") == [0, 4, 8]
    assert steps_of(manager, "spectra") == ([0, 4, 8] if spectra else [])
    assert {r["kind"] for r in manager.history} == ({"effect", "spectra"} if spectra else {"effect"})
    for record in manager.history:
        for layer in record["layers"].values() if record["kind"] == "spectra" else []:
            assert len(layer["eigenvalues_a"]) == len(layer["eigenvalues_g"]) == 2
    manager.close()


def test_what_a_spectrum_says_is_so():
    model, manager, optimizer = start(quick(log_top_eigs=R), torch.float64)
    train(model, optimizer, 3)
    record = [r for r in manager.history if r["kind"] == "spectra"][-1]
    for state, i, pair in manager.layers():
        entry = record["layers"][pair.name]
        assert (entry["r"], entry["k"], entry["samples"]) == (R, R, 96.0)
        for side, cov in zip("ag", state.covariances(), strict=True):
            values = torch.linalg.eigvalsh(cov[i]).flip(0)
            share = values / values.sum()
            assert entry[f"eigenvalues_{side}"] == pytest.approx(values.tolist(), rel=1e-8)
            assert entry[f"condition_{side}"] == pytest.approx(float(values[0] / values[-1]), rel=1e-6)
            assert entry[f"effective_rank_{side}"] == pytest.approx(float(torch.exp(-(share * share.log()).sum())))
            assert entry[f"damping_share_{side}"] == pytest.approx(1e-3)
    manager.close()


# Reprojection


@pytest.mark.parametrize("mode", ["eigen_adamw", "adamw"])
@pytest.mark.parametrize(("warmup", "expected"), [(0, [2, 4, 6, 8, 10]), (6, [6, 8, 10]), (7, [8, 10])])
def test_reprojection_waits_for_its_warmup(mode, warmup, expected):
    config = quick(mode=mode, reprojection="balanced", reprojection_freq=2, reprojection_warmup_steps=warmup)
    model, manager, optimizer = start(config)
    calls = spy_on(manager, "neural_reprojection")
    train(model, optimizer, 10)
    assert calls == expected
    assert steps_of(manager, "reprojection") == expected
    manager.close()


def test_reprojection_none_never_happens():
    model, manager, optimizer = start(quick(reprojection_freq=1))
    calls = spy_on(manager, "neural_reprojection")
    train(model, optimizer, 5)
    manager.finish()
    assert calls == [] and steps_of(manager, "reprojection") == []
    assert {p.rank for p in manager.pairs()} == {R}
    manager.close()


@pytest.mark.parametrize("adaptive", [True, False])
def test_an_interval_of_zero_reprojects_at_the_end_only(adaptive):
    config = quick(
        reprojection="balanced", reprojection_freq=0, rank_adaptation_threshold=0.5, adaptive_schedule=adaptive
    )
    model, manager, optimizer = start(config)
    train(model, optimizer, 5)
    assert steps_of(manager, "reprojection") == []
    manager.finish(optimizer)
    assert steps_of(manager, "reprojection") == [5]
    assert all(p.rank < R for p in manager.pairs())
    manager.close()


def smallest_rank(values, threshold):
    """The documents' rule: the first k whose share of the sum reaches τ."""
    values = sorted((max(v, 0.0) for v in values), reverse=True)
    return next(k for k in range(1, R + 1) if sum(values[:k]) >= threshold * sum(values) * (1 - 1e-12))


@pytest.mark.parametrize("kind", ["balanced", "paper"])
@pytest.mark.parametrize("adaptation", [True, False])
def test_k_is_fixed_before_rank_adaptation_starts_and_adaptive_from_there(kind, adaptation):
    threshold = 0.9
    config = quick(
        reprojection=kind,
        reprojection_freq=2,
        reprojection_k=5,
        rank_adaptation_start_step=6,
        enable_rank_adaptation=adaptation,
        rank_adaptation_threshold=threshold,
    )
    model, manager, optimizer = start(config, torch.float64)
    expected, reproject = {}, manager.neural_reprojection

    def watched(*args, **kwargs):
        found = {}
        for state, i, pair in manager.layers():
            cov_a, cov_g = (c[i] for c in state.covariances())
            if manager.step < 6 or not adaptation:
                found[pair.name] = (5, 5)
            elif kind == "balanced":
                k = smallest_rank(torch.linalg.eigvals(cov_a @ cov_g).real.tolist(), threshold)
                found[pair.name] = (k, k)
            else:
                values = [torch.linalg.eigvalsh(c).tolist() for c in (cov_a, cov_g)]
                found[pair.name] = tuple(smallest_rank(v, threshold) for v in values)
        expected[manager.step] = found
        return reproject(*args, **kwargs)

    manager.neural_reprojection = watched
    train(model, optimizer, 8)
    events = {r["step"]: r["layers"] for r in manager.history if r["kind"] == "reprojection"}
    assert sorted(events) == sorted(expected) == [2, 4, 6, 8]
    said = {s: {name: (v["k_a"], v["k_b"]) for name, v in layers.items()} for s, layers in events.items()}
    assert said == expected
    if adaptation:
        assert any(min(k) < 5 for k in said[6].values())
    for state, i, pair in manager.layers():
        assert int(state["k"][i]) == min(said[8][pair.name])
        assert torch.linalg.matrix_rank(pair.b.detach() @ pair.a.detach(), rtol=1e-9) <= min(said[8][pair.name])
    manager.close()


def test_min_lora_rank_bounds_both_kinds_of_k():
    for adaptation in (True, False):
        config = quick(
            reprojection="balanced",
            reprojection_freq=2,
            reprojection_k=1,
            rank_adaptation_threshold=1e-6,
            min_lora_rank=3,
            enable_rank_adaptation=adaptation,
        )
        model, manager, optimizer = start(config)
        train(model, optimizer, 2)
        event = [r for r in manager.history if r["kind"] == "reprojection"][0]
        assert {v["k_a"] for v in event["layers"].values()} == {3}
        manager.close()


# Regularisers


def added_by_regularizers(config, steps, dtype=torch.float64):
    """What stands in `.grad` beyond the loss gradient at each step, with weights and statistics held still."""
    model, manager, optimizer = start(config, dtype, lr=0.0)
    found = []
    for _ in range(steps):
        backward(model)
        raw = [p.grad.clone() for p in trainable(model)]
        optimizer.step()
        found.append([p.grad - g for p, g in zip(trainable(model), raw, strict=True)])
        optimizer.zero_grad()
    return found, model, manager


def autograd_penalty(model, manager, config):
    """λ_kfac·[tr(AᵀΣ_gA) + tr(BΣ_aBᵀ)] + λ_reproj·[‖(I−P_a)A‖² + ‖B(I−P_g)‖²] and its gradients by autograd."""
    total = 0.0
    for state, i, pair in manager.layers():
        cov_a, cov_g = (c[i] for c in state.covariances())
        projector = {}
        for side, cov in (("a", cov_a), ("g", cov_g)):
            vectors = torch.linalg.eigh(cov)[1][:, -config.reprojection_k :]
            projector[side] = vectors @ vectors.mT
        eye = torch.eye(R, dtype=cov_a.dtype)
        curvature = torch.trace(pair.a.mT @ cov_g @ pair.a) + torch.trace(pair.b @ cov_a @ pair.b.mT)
        outside = ((eye - projector["a"]) @ pair.a).square().sum() + (pair.b @ (eye - projector["g"])).square().sum()
        total = total + config.lambda_kfac * curvature + config.lambda_reproj * outside
    return float(total.detach()), torch.autograd.grad(total, trainable(model))


@pytest.mark.parametrize(("curvature", "outside"), [(300.0, 0.0), (0.0, 0.7), (300.0, 0.7)])
def test_the_regularisers_gradient_is_autograds(curvature, outside):
    config = quick(lambda_kfac=curvature, lambda_reproj=outside, reprojection_k=2, ng_warmup_steps=100)
    added, model, manager = added_by_regularizers(config, 1)
    value, expected = autograd_penalty(model, manager, config)
    for ours, theirs in zip(added[0], expected, strict=True):
        assert float(theirs.norm()) > 1e-2
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert manager.metrics()["grit/regularizer"] == pytest.approx(value, rel=1e-10)
    manager.close()


def test_the_regularisers_are_added_before_preconditioning():
    """Their gradient is preconditioned like the loss's."""
    config = quick(lambda_kfac=0.3, lambda_reproj=0.7, reprojection_k=2, grafting=False)
    model, manager, optimizer = start(config, torch.float64, lr=0.0)
    backward(model)
    raw = [p.grad.clone() for p in trainable(model)]
    optimizer.step()
    _, extra = autograd_penalty(model, manager, config)
    place = {id(p): i for i, p in enumerate(trainable(model))}
    for state, i, pair in manager.layers():
        a, b = place[id(pair.a)], place[id(pair.b)]
        inverse_a, inverse_g = (
            torch.linalg.inv(c[i] + 1e-3 * torch.trace(c[i]) / R * torch.eye(R, dtype=c.dtype))
            for c in state.covariances()
        )
        torch.testing.assert_close(pair.a.grad, inverse_g @ (raw[a] + extra[a]), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(pair.b.grad, (raw[b] + extra[b]) @ inverse_a, rtol=1e-8, atol=1e-9)
    manager.close()


def test_the_regularisers_are_raised_linearly_over_their_warmup():
    settings = {"lambda_kfac": 0.3, "lambda_reproj": 0.7, "reprojection_k": 2, "ng_warmup_steps": 100}
    full, _, first = added_by_regularizers(quick(**settings), 1)
    ramped, _, second = added_by_regularizers(quick(**settings, regularizer_warmup_steps=5), 8)
    for s, added in enumerate(ramped):
        for ours, whole in zip(added, full[0], strict=True):
            torch.testing.assert_close(ours, min(1.0, s / 5) * whole, rtol=1e-9, atol=1e-12)
    first.close()
    second.close()


def test_regularisers_leave_layers_without_gradient_or_statistics_alone():
    config = quick(lambda_kfac=0.3, lambda_reproj=0.7, reprojection_k=2, ng_warmup_steps=100, capture="gradients")
    model, manager, optimizer = start(config, torch.float64, lr=0.0)
    backward(model)
    first, second, _ = manager.pairs()
    first.a.grad = first.b.grad = None
    raw = second.a.grad.clone()
    optimizer.step()
    assert first.a.grad is None and first.b.grad is None
    assert not torch.equal(second.a.grad, raw)
    manager.close()
    config.grit_cov_update_freq, config.capture = 5, "hooks"
    model, manager, optimizer = start(config, torch.float64, lr=0.0)
    manager.step = 1  # no statistics are taken here, and there are none yet
    backward(model)
    raw = [p.grad.clone() for p in trainable(model)]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(trainable(model), raw, strict=True))
    manager.close(check=False)


def test_regularisers_pull_weights_down():
    """A strong penalty shrinks what it penalises, against the same run without it."""
    norms = {}
    for strength in (0.0, 100.0):
        model, manager, optimizer = start(quick(mode="eigen_adamw", lambda_kfac=strength))
        train(model, optimizer, 30)
        norms[strength] = sum(float(p.detach().square().sum()) for p in trainable(model))
        manager.close()
    assert norms[100.0] < 0.8 * norms[0.0]


# Intervals that follow the loss


def test_ramp():
    assert [ramp(s, 4) for s in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert ramp(0, 0) == 1.0


def test_the_interval_factor_halves_on_a_moving_loss_and_doubles_on_a_flat_one_within_bounds():
    trend = LossTrend(quick(adaptive_schedule=True, adaptive_window=3))
    factors = []

    def window(loss):
        for noise in (-0.001, 0.001, 0.0):
            trend.see(loss + noise)
        factors.append(trend.factor)

    for _ in range(5):
        window(2.0)
    assert factors == [1.0, 2.0, 4.0, 4.0, 4.0]  # the first window has nothing to be compared with
    for i in range(6):
        window(2.0 * 0.9 ** (i + 1))
    assert factors[5:] == [2.0, 1.0, 0.5, 0.25, 0.25, 0.25]
    window(2.0 * 0.9**6 * 1.2)  # rising is moving, too
    assert factors[-1] == 0.25
    window(2.0 * 0.9**6 * 1.2 * 0.97)  # between the thresholds nothing happens
    assert factors[-1] == 0.25
    window(2.0 * 0.9**6 * 1.2 * 0.97)
    assert factors[-1] == 0.5
    assert [trend.interval(base) for base in (50, 1, 3)] == [25, 1, 2]


def test_a_loss_that_is_nan_once_does_not_stop_the_schedule():
    trend = LossTrend(quick(adaptive_schedule=True, adaptive_window=2))
    for loss in (1.0, 1.0, float("nan"), 1.0, 1.0, 1.0, 1.0, 1.0):
        trend.see(loss)
    assert trend.factor == 2.0


def test_the_trend_goes_on_from_a_checkpoint():
    losses = [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    whole, half = (LossTrend(quick(adaptive_schedule=True, adaptive_window=2)) for _ in range(2))
    for loss in losses[:3]:
        whole.see(loss)
        half.see(loss)
    resumed = LossTrend(quick(adaptive_schedule=True, adaptive_window=2))
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
    for loss in losses[3:]:
        whole.see(loss)
        resumed.see(loss)
    assert resumed.state_dict() == whole.state_dict()
    assert whole.factor == 1.0 and whole.state_dict()["count"] == 1


@pytest.mark.parametrize(
    ("adaptive", "losses", "inversions", "reprojections"),
    [
        # Factor 2 from the 4th loss on (step 3), 4 from the 6th (step 5) on.
        (True, [1.0] * 40, [0, 16, 32], [16, 32]),
        # 1/2 from step 3 on, 1/4 from step 5 on: 4 · 1/4 = 1 and 4 · 1/4 = 1.
        (True, [0.7**i for i in range(12)], [0, 3, 5, 6, 7, 8, 9, 10, 11], [4, 6, 7, 8, 9, 10, 11, 12]),
        (False, [1.0] * 12, [0, 4, 8], [4, 8, 12]),
        (False, [0.7**i for i in range(12)], [0, 4, 8], [4, 8, 12]),
    ],
)
def test_the_intervals_of_inversion_and_reprojection_follow_the_loss(adaptive, losses, inversions, reprojections):
    config = quick(
        kfac_update_freq=4,
        adaptive_schedule=adaptive,
        adaptive_window=2,
        reprojection="balanced",
        reprojection_freq=4,
        rank_adaptation_threshold=1.0,
    )
    model, manager, optimizer = start(config)
    inverted = spy_on(manager, "update_and_invert_factors")
    reprojected = spy_on(manager, "neural_reprojection")
    train(model, optimizer, len(losses), losses)
    assert inverted == inversions
    assert reprojected == reprojections
    manager.close()


# Log file


def strict_lines(file):
    """Every line by a reader that takes no NaN or Infinity."""

    def refuse(name):
        raise AssertionError(f"not JSON: {name}")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_line_of_the_log_is_json_with_nan_inside_too(tmp_path):
    file = tmp_path / "deep" / "grit.jsonl"
    config = quick(log_eig_heatmaps=True, reprojection="balanced", reprojection_freq=2, rank_adaptation_threshold=0.8)
    model, manager, optimizer = start(config, log_file=file)
    train(model, optimizer, 3)
    for poison in (float("nan"), float("inf")):
        backward(model)
        trainable(model)[0].grad.fill_(poison)
        optimizer.step()
        optimizer.zero_grad()
    manager.add_record({"kind": "odd", "values": [float("nan"), {"deep": [-float("inf"), 1.5]}], "text": 'ü"\n'})
    manager.finish()
    manager.close()
    lines = strict_lines(file)
    assert len(lines) == len(manager.history) > 8
    assert lines == manager.history
    assert [r["gradient_norm"] for r in lines if r["kind"] == "skipped"] == ["nan", "inf"]
    odd = next(r for r in lines if r["kind"] == "odd")
    assert odd == {"step": 5, "kind": "odd", "values": ["nan", {"deep": ["-inf", 1.5]}], "text": 'ü"\n'}
    assert {"effect", "spectra", "skipped", "reprojection", "odd", "final"} == {r["kind"] for r in lines}
    final = lines[-1]
    assert final["kind"] == "final" and final["skipped_steps"] == 2 and len(final["factors"]) == 3
    assert [r["step"] for r in lines] == sorted(r["step"] for r in lines)


def test_records_are_on_disk_at_once(tmp_path):
    file = tmp_path / "grit.jsonl"
    model, manager, optimizer = start(quick(), log_file=file)
    for i in range(3):
        backward(model, i)
        optimizer.step()
        optimizer.zero_grad()
        assert strict_lines(file) == manager.history
        assert len(manager.history) == 2 * (i + 1)
    manager.close()


def test_after_loading_the_log_holds_exactly_the_restored_history(tmp_path):
    file, other = tmp_path / "grit.jsonl", tmp_path / "other.jsonl"
    model, manager, optimizer = start(quick(), log_file=file)
    train(model, optimizer, 2)
    backward(model)
    trainable(model)[0].grad.fill_(float("nan"))
    optimizer.step()
    optimizer.zero_grad()
    state = manager.state_dict()
    then = strict_lines(file)
    train(model, optimizer, 3)
    assert len(strict_lines(file)) == len(then) + 6
    manager.load_state_dict(state)  # back in the same run
    assert strict_lines(file) == then == manager.history
    manager.close(check=False)

    other.write_text("what another run left\n", encoding="utf-8")
    model, resumed, optimizer = start(quick(), log_file=other)
    resumed.load_state_dict(state)  # in a new process
    assert strict_lines(other) == then == resumed.history
    train(model, optimizer, 1)
    lines = strict_lines(other)
    assert lines[: len(then)] == then and [r["step"] for r in lines[len(then) :]] == [3, 3]
    resumed.close()


def test_loading_an_empty_history_empties_the_log(tmp_path):
    file = tmp_path / "grit.jsonl"
    model, manager, optimizer = start(quick(), log_file=file)
    state = manager.state_dict()
    train(model, optimizer, 2)
    assert file.stat().st_size > 0
    manager.load_state_dict(state)
    assert file.read_text() == "" and manager.history == [] and manager.step == 0
    manager.close(check=False)
