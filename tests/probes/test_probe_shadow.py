"""The shadow is torch's AdamW: the weights that it would have led to are those that AdamW leads to."""

import copy

import pytest
import torch
from torch import nn

from probes.shadow import Shadow, shadow_options

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
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 0.05, **options})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) if schedule else None
    parameters = list(mine.parameters())
    shadow = Shadow(parameters)
    for step in range(STEPS):
        for micro in range(accumulation):
            backward(model, step * accumulation + micro)
            backward(mine, step * accumulation + micro)
        if step in skip:  # one tensor gets no gradient
            next(iter(model.parameters())).grad = None
            parameters[0].grad = None
        told = shadow_options(optimizer, list(model.parameters()))
        raw = [p.grad for p in parameters]
        changes = shadow.update(raw, told, clip, [p.detach() for p in parameters])
        with torch.no_grad():
            for p, change in zip(parameters, changes, strict=True):
                p.copy_((p.float() + change).to(dtype))
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler:
            scheduler.step()
        model.zero_grad()
        mine.zero_grad()
    return [p.detach() for p in model.parameters()], [p.detach() for p in parameters]


CASES = {
    "plain": {"weight_decay": 0.0},
    "clipping": {"clip": 0.05},
    "clipping that does not bite": {"clip": 1e6},
    "weight decay": {"weight_decay": 0.3},
    "schedule": {"schedule": lambda s: (s + 1) / STEPS},
    "accumulation": {"accumulation": 3},
    "betas and eps": {"betas": (0.7, 0.9), "eps": 1e-3},
    "a tensor without gradient now and then": {"skip": (0, 5, 6)},
    "all of it": {"clip": 0.1, "weight_decay": 0.1, "accumulation": 2, "schedule": lambda s: 1 - s / 30},
}


@pytest.mark.parametrize("kernel", ["foreach", "fused", "single"])
@pytest.mark.parametrize("case", CASES)
def test_the_shadows_weights_are_adamws(case, kernel):
    chosen = {"foreach": {"foreach": True}, "fused": {"fused": True}, "single": {"foreach": False}}[kernel]
    theirs, ours = both(**CASES[case], **chosen)
    start = [p.detach() for p in net().parameters()]
    for a, b, s in zip(theirs, ours, start, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert float((a - s).norm()) > 0.05  # they did move


@pytest.mark.parametrize("kernel", ["foreach", "fused", "single"])
@pytest.mark.parametrize("case", ["plain", "clipping", "weight decay", "accumulation"])
def test_in_bfloat16_to_the_bit(case, kernel):
    chosen = {"foreach": {"foreach": True}, "fused": {"fused": True}, "single": {"foreach": False}}[kernel]
    theirs, ours = both(torch.bfloat16, **CASES[case], **chosen)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_it_touches_no_weight_and_no_gradient():
    model = net()
    backward(model, 0)
    parameters = list(model.parameters())
    before = copy.deepcopy([(p.detach(), p.grad) for p in parameters])
    options = shadow_options(torch.optim.AdamW(parameters, lr=0.1), parameters)
    changes = Shadow(parameters).update([p.grad for p in parameters], options, 1e-3, [p.detach() for p in parameters])
    assert all(torch.equal(p, w) and torch.equal(p.grad, g) for p, (w, g) in zip(parameters, before, strict=True))
    assert all(float(c.norm()) > 0 for c in changes)


def test_moments_go_on_where_no_change_is_asked_for():
    model = net()
    parameters = list(model.parameters())
    options = shadow_options(torch.optim.AdamW(parameters, lr=0.1), parameters)
    one, other = Shadow(parameters), Shadow(parameters)
    weights = [p.detach() for p in parameters]
    for i in range(4):
        model.zero_grad()
        backward(model, i)
        raw = [p.grad for p in parameters]
        assert one.update(raw, options, 0.0) == []
        other.update(raw, options, 0.0, weights)
    last = [shadow.update(raw, options, 0.0, weights) for shadow in (one, other)]
    assert all(torch.equal(a, b) for a, b in zip(*last, strict=True))


def test_gradients_that_are_not_finite_leave_the_moments_alone():
    parameters = list(net().parameters())
    options = shadow_options(torch.optim.AdamW(parameters, lr=0.1), parameters)
    shadow = Shadow(parameters)
    raw = [torch.ones_like(p) for p in parameters]
    shadow.update(raw, options, 0.0)
    before = copy.deepcopy(shadow.state_dict())
    raw[1][0] = float("nan")
    changes = shadow.update(raw, options, 0.0, [p.detach() for p in parameters])
    assert not any(bool(c.any()) for c in changes)
    assert all(torch.equal(before[k], v) for k, v in shadow.state_dict().items())


def test_state_goes_on_and_refuses_other_tensors():
    parameters = list(net().parameters())
    options = shadow_options(torch.optim.AdamW(parameters, lr=0.1), parameters)
    one, other = Shadow(parameters), Shadow(parameters)
    raw = [torch.ones_like(p) for p in parameters]
    one.update(raw, options, 0.0)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    weights = [p.detach() for p in parameters]
    for a, b in zip(one.update(raw, options, 0.0, weights), other.update(raw, options, 0.0, weights), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="same 4 tensors"):
        Shadow(parameters).load_state_dict(Shadow(parameters[:3]).state_dict())
    with pytest.raises(ValueError, match="same 4 tensors"):
        Shadow(parameters).load_state_dict(Shadow([nn.Parameter(p.detach()[:1]) for p in parameters]).state_dict())


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


def test_weight_decay_is_each_groups_own():
    """As the Trainer groups them: matrices decay, biases and norms do not."""
    torch.manual_seed(0)
    matrix, bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6))
    groups = [{"params": [matrix], "weight_decay": 0.5}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    shadow = Shadow([matrix, bias])
    for _ in range(4):
        for p in (matrix, bias):
            p.grad = torch.randn_like(p)
        before = [p.detach().clone() for p in (matrix, bias)]
        options = shadow_options(optimizer, [matrix, bias])
        changes = shadow.update([matrix.grad, bias.grad], options, 0.0, before)
        optimizer.step()
        for p, old, change in zip((matrix, bias), before, changes, strict=True):
            torch.testing.assert_close(p.detach() - old, change, rtol=1e-5, atol=1e-7)
