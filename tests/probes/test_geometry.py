"""Numbers from r×r products equal those of formed matrices; checksums see every bit; the shadow is torch's AdamW."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from probes.geometry import derived, products, weight_products, zero_share
from probes.shadow import Shadow, clipping, shadow_options


def pair(generator, r, d_in, d_out, scale=1.0):
    shapes = {"a": (r, d_in), "b": (d_out, r)}
    return {side: torch.randn(shape, generator=generator) * scale for side, shape in shapes.items()}


def formed(change, weights):
    """B·δA + δB·A [d_out, d_in] in float64."""
    a, b, da, db = (t.double() for t in (weights["a"], weights["b"], change["a"], change["b"]))
    return b @ da + db @ a


def flat(values):
    return torch.cat([v.double().flatten() for v in values.values()])


def angle(u, v):
    u, v = u.double() / u.double().norm(), v.double() / v.double().norm()
    return math.degrees(2 * math.atan2(float((u - v).norm()), float((u + v).norm())))


def measured(u, v, weights=None):
    """What a record says of a gradient u that became v, and of a change u beside a shadow v."""
    weights = weights or u
    sums = sum(products([u[s], v[s], weights[s], u[s], v[s]]) for s in u)
    of_weights = weight_products(u, v, weights).tolist() if u.keys() == {"a", "b"} else None
    return derived(sums.tolist(), ["raw", "inner", "weights", "delta", "shadow"], of_weights)


shapes = st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 20))


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 10_000), st.sampled_from([1e-6, 1e-3, 1.0, 1e3]))
def test_norms_and_angles_equal_those_of_formed_matrices(shape, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    weights, u, v = (pair(generator, *shape, s) for s in (1.0, scale, 1.0))
    found = measured(u, v, weights)
    assert found["norm_raw"] == pytest.approx(float(flat(u).norm()), rel=1e-12)
    assert found["norm_weights"] == pytest.approx(float(flat(weights).norm()), rel=1e-12)
    assert found["angle"] == pytest.approx(angle(flat(u), flat(v)), abs=1e-5)
    # The same two vectors at another place of the matrix: not the same bits on every CPU.
    assert found["angle_raw_inner"] == pytest.approx(found["angle"], rel=1e-12, abs=2e-6)
    assert found["lr_ratio"] == pytest.approx(float(flat(u).norm() / flat(v).norm()), rel=1e-12)
    cosine = torch.nn.functional.cosine_similarity(flat(u), flat(v), 0)
    assert found["cos_raw_inner"] == pytest.approx(float(cosine), abs=1e-12)
    # Where B·δA and δB·A nearly cancel, fewer digits are left.
    if min(float(formed(w, weights).norm()) / float(flat(w).norm()) for w in (u, v)) > 0.3:
        assert found["angle_weights"] == pytest.approx(angle(formed(u, weights), formed(v, weights)), abs=1e-3)


def test_small_and_large_angles_keep_their_digits():
    u, w = torch.randn(2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, w = u / u.norm(), w - (w @ u) * u / (u @ u)
    for degrees in (1e-4, 1e-2, 1.0, 45.0, 90.0, 135.0, 179.99):
        v = math.cos(math.radians(degrees)) * u + math.sin(math.radians(degrees)) * w / w.norm()
        found = measured({"w": u.float()}, {"w": 7 * v.float()})["angle"]
        assert found == pytest.approx(degrees, rel=0.02, abs=1e-5)


def test_opposite_vectors_and_an_angle_with_nothing():
    u, weights = (pair(torch.Generator().manual_seed(seed), 3, 8, 5) for seed in (1, 2))
    opposite, zero, broken = ({side: factor * v for side, v in u.items()} for factor in (-1, 0, math.nan))
    found = measured(u, opposite, weights)
    assert found["angle"] == pytest.approx(180) and found["angle_weights"] == pytest.approx(180)
    assert found["cos_raw_inner"] == pytest.approx(-1) and measured(u, u)["angle"] == pytest.approx(0.0, abs=2e-6)
    assert not {measured(u, zero)[key] for key in ("angle", "cos_raw_inner", "lr_ratio")} - {None}
    assert measured(u, u, zero)["angle_weights"] is None  # B = A = 0: no change of ΔW to first order
    assert measured(u, broken)["angle"] is None and measured(broken, u)["norm_raw"] is None


def test_zero_share_counts_what_was_lost_and_nothing_else():
    raw = {"a": torch.tensor([[1.0, 0.0, float("nan"), float("inf")]]), "b": torch.tensor([[2.0], [3.0]])}
    after = {"a": torch.tensor([[0.0, 0.0, 0.0, 0.0]]), "b": torch.tensor([[2.0], [-3.0]])}
    assert float(zero_share(after, raw)) == pytest.approx(3 / 6)
    assert float(zero_share(raw, after)) == 0.0


# The shadow

STEPS = 20


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def backward(model, i):
    generator = torch.Generator().manual_seed(i)
    x, y = (torch.randn(16, n, generator=generator).to(next(model.parameters()).dtype) for n in (6, 4))
    (model(x) - y).square().mean().backward()


def both(dtype=torch.float32, clip=0.0, accumulation=1, schedule=None, skip=(), **options):
    """Weights of AdamW, and those that the shadow alone moves, with gradients of its own."""
    model, mine = net(dtype), net(dtype)
    (a, b), (c, d) = (model[i].parameters() for i in (0, 2))  # biases are a group of their own, without decay
    groups = [{"params": [a, c]}, {"params": [b, d], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **{"lr": 0.05, **options})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) if schedule else None
    parameters = list(mine.parameters())
    shadow = Shadow(parameters)
    for step in range(STEPS):
        for micro in range(accumulation):
            for each in (model, mine):
                backward(each, step * accumulation + micro)
        if step in skip:  # one tensor gets no gradient
            model[0].weight.grad = mine[0].weight.grad = None
        told = shadow_options(optimizer, list(model.parameters()))
        known = [p.grad is not None for p in parameters]
        own = [p.grad for p in parameters if p.grad is not None]
        factor = clipping(own, float(torch.nn.utils.get_total_norm(own)), clip)
        raw, weights = (shadow.layout.stack(x) for x in ([p.grad for p in parameters], parameters))
        changes = shadow.layout.views(shadow.update(raw, known, told, weights, factor))
        with torch.no_grad():
            for p, change in zip(parameters, changes, strict=True):
                p.copy_((p.float() + change).to(dtype))
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler:
            scheduler.step()
        nn.ModuleList([model, mine]).zero_grad()
    return [p.detach() for p in model.parameters()], [p.detach() for p in parameters]


CASES = {
    "plain": {"weight_decay": 0.0},
    "clipping": {"clip": 0.05},
    "weight decay": {"weight_decay": 0.3},
    "accumulation": {"accumulation": 3},
    "betas and eps": {"betas": (0.7, 0.9), "eps": 1e-3},
    "a tensor without gradient now and then": {"skip": (0, 5, 6)},
    "all of it": {"clip": 0.1, "weight_decay": 0.1, "accumulation": 2, "schedule": lambda s: 1 - s / 30},
}
KERNELS = {"foreach": {"foreach": True}, "fused": {"fused": True}, "single": {"foreach": False}}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_the_shadows_weights_are_adamws(case, kernel):
    theirs, ours = both(**CASES[case], **KERNELS[kernel])
    start = [p.detach() for p in net().parameters()]
    for a, b, s in zip(theirs, ours, start, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert float((a - s).norm()) > 0.05  # they did move


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", ["plain", "clipping", "weight decay", "accumulation"])
def test_in_bfloat16_to_the_bit(case, kernel):
    theirs, ours = both(torch.bfloat16, **CASES[case], **KERNELS[kernel])
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_moments_go_on_from_a_state_and_a_step_without_gradients_changes_none():
    parameters = list(net().parameters())
    options = shadow_options(torch.optim.AdamW(parameters, lr=0.1), parameters)
    shadow, resumed = Shadow(parameters), Shadow(parameters)
    weights = shadow.layout.stack(parameters)
    for i in range(4):
        model = net()
        backward(model, i)
        raw = shadow.layout.stack([p.grad for p in model.parameters()])
        shadow.update(raw, [True] * 4, options, weights)
    assert not any(bool(c.any()) for c in shadow.update(raw, [False] * 4, options, weights))
    resumed.load_state_dict(copy.deepcopy(shadow.state_dict()))
    both = [s.update(raw, [True] * 4, options, weights) for s in (shadow, resumed)]
    assert all(torch.equal(*changes) and bool(changes[0].any()) for changes in zip(*both, strict=True))
    for others in (parameters[:3], [nn.Parameter(w[:1]) for w in weights]):
        with pytest.raises(ValueError, match="same 4 tensors"):
            Shadow(parameters).load_state_dict(Shadow(others).state_dict())


def test_options_are_those_of_the_lowest_rate_and_torchs_own_where_there_are_none():
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    groups = [{"params": [a], "lr": 0.3}, {"params": [b], "lr": 0.1, "betas": (0.5, 0.6)}, {"params": [c], "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=0.2, eps=1e-5)
    told = shadow_options(optimizer, [a, b])
    assert told["lr"] == 0.1 and told["adam"] is True
    assert [own[:3] for own in told["each"]] == [((0.9, 0.999), 1e-5, 0.2), ((0.5, 0.6), 1e-5, 0.2)]
    sgd = shadow_options(torch.optim.SGD([a], lr=2.0), [a])
    assert sgd["lr"] == 2.0 and sgd["each"][0][:3] == ((0.9, 0.999), 1e-8, 0.0) and sgd["adam"] is False
    frozen = torch.optim.AdamW([{"params": [a], "lr": 0.0}, {"params": [b], "lr": 0.2}])
    assert shadow_options(frozen, [a, b])["lr"] == 0.2, "a group that stands still is no yardstick"
    half = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    assert shadow_options(torch.optim.AdamW([half, a], lr=0.1), [half, a])["each"][0][3] is None, "bf16: torch's own"
