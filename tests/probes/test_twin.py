"""Twin curves: floor, ratio, a start that is off by one rounding; and pictures that can be drawn."""

import math
import random

import pytest
import torch
from torch import nn

from probes import Evidence, Probe, Twin, perturb
from probes.plots import plot_ledger, plot_twin
from probes.twin import DIVERGES, distance


def curve(offset=0.0, noise=0.0, seed=0, steps=60):
    numbers = random.Random(seed)
    return [2 + 2 * math.exp(-i / 20) + offset * i / steps + noise * numbers.gauss(0, 1) for i in range(steps)]


def test_floor_divergence_and_ratio():
    twin = Twin([1.0, 2.0], [1.0, 2.1], [1.3, 2.4], perturbed=True)
    assert twin.floor == pytest.approx(0.1 / math.sqrt(2)) and twin.divergence == pytest.approx(math.sqrt(0.125))
    assert twin.ratio == pytest.approx(5) and not twin.diverges
    assert distance([0.0, 0.0], [3.0, -4.0]) == pytest.approx(math.sqrt(12.5))
    at_the_line, beyond = (Twin([0.0], [1.0], [factor], perturbed=True) for factor in (10.0, 10.001))
    assert DIVERGES == 10 and not at_the_line.diverges and beyond.diverges


def test_the_floor_is_not_below_what_a_float32_loss_can_show():
    step = 2.0**-21  # between float32 numbers just above 4
    equal = Twin([4.0, 2.0], [4.0, 2.0], [4.0, 2.0], False)
    assert equal.floor == step / 2 and equal.ratio == 0.0 and not equal.diverges
    assert not Twin([4.0], [4.0], [4.0 + step], False).diverges, "one rounding apart"
    far = Twin([4.0], [4.0], [4.0 + 100 * step], False)
    assert far.ratio == pytest.approx(200) and far.diverges
    assert Twin([4.0], [4.0 + 8 * step], [4.0], False).floor == 8 * step, "what was measured, where that is more"


def test_a_floor_of_zero_and_a_loss_that_is_no_number():
    equal, apart = Twin([0.0], [0.0], [0.0], False), Twin([0.0], [0.0], [1e-12], False)
    assert equal.ratio == 0.0 and not equal.diverges and apart.ratio == math.inf and apart.diverges
    assert Twin([1.0, 1.0], [1.0, 1.1], [1.0, math.nan], True).diverges


@pytest.mark.parametrize("lengths", [(3, 3, 2), (3, 2, 3), (2, 3, 3), (0, 0, 0)])
def test_curves_of_different_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match="three loss curves of one length"):
        Twin(*[[1.0] * n for n in lengths], perturbed=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_perturbed_start_is_off_by_one_rounding_step_at_most_and_zeros_stay(dtype):
    torch.manual_seed(0)
    model = nn.Linear(50, 40).to(dtype)
    with torch.no_grad():
        model.weight[::2] = 0
        model.weight[1] = torch.logspace(-3, 3, 50).to(dtype)
    model.bias.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    random_state = torch.get_rng_state()
    perturb(model, seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    weight, bias = (p.detach() for p in model.parameters())
    assert torch.equal(bias, before[1]) and not bool(weight[::2].any())
    up = torch.nextafter(before[0], torch.full_like(before[0], math.inf))
    down = torch.nextafter(before[0], torch.full_like(before[0], -math.inf))
    # eps·|w| is one to two of the spacings at w.
    two_up = torch.nextafter(up, torch.full_like(up, math.inf))
    two_down = torch.nextafter(down, torch.full_like(down, -math.inf))
    live = before[0] != 0
    assert bool(((weight <= two_up) & (weight >= two_down))[live].all())
    moved = (weight != before[0])[live].double().mean()
    assert 0.4 < float(moved) < 0.95
    assert bool((weight > before[0]).any()) and bool((weight < before[0]).any())


# Pictures


def is_picture(path):
    content = path.read_bytes()
    return content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 10_000


def trained(steps=24, cls=torch.optim.SGD, every=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = cls(model.parameters(), lr=1e-2)
    with Probe(model, optimizer, every=every) as probe:
        for _ in range(steps):
            model(torch.randn(16, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return Evidence.of(probe)


def test_a_ledger_is_drawn_even_of_one_sample_or_without_numbers(tmp_path):
    assert is_picture(plot_ledger(trained(), tmp_path / "ledger.png", title="a run"))
    assert is_picture(plot_ledger(trained(steps=1, cls=torch.optim.AdamW), tmp_path / "one.png"))
    evidence = trained(steps=4)
    for record in evidence.records:
        for entry in record["units"].values():
            entry.update(cos_raw_inner=None, angle=None, lr_ratio=None)
    assert is_picture(plot_ledger(evidence, tmp_path / "none.png"))


def test_twins_are_drawn(tmp_path):
    hole = [*curve()[:5], *[math.nan] * 55]
    for again, arm in ((curve(), curve()), (curve(noise=1e-6), curve(offset=-0.3)), (curve(noise=1e-6), hole)):
        twin = Twin(curve(), again, arm, perturbed=True)
        assert is_picture(plot_twin(twin, tmp_path / "twin.png", name="pure_grit"))
