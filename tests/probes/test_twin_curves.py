"""Twin curves: floor, ratio, a start that is off by one rounding; and pictures that can be drawn."""

import math

import pytest
import torch
from torch import nn

from probes import Evidence, Twin, perturb
from probes.figures import plot_ledger, plot_twin


def test_floor_divergence_and_ratio():
    twin = Twin([1.0, 2.0], [1.0, 2.1], [1.3, 2.4])
    assert twin.floor == pytest.approx(0.1 / math.sqrt(2)) and twin.divergence == pytest.approx(math.sqrt(0.125))
    assert twin.ratio == pytest.approx(5) and not twin.diverges
    at_the_line, beyond = (Twin([0.0], [1.0], [factor]) for factor in (10.0, 10.001))
    assert not at_the_line.diverges and beyond.diverges
    equal, apart = Twin([0.0], [0.0], [0.0]), Twin([0.0], [0.0], [1e-12])
    assert equal.ratio == 0.0 and not equal.diverges and apart.ratio == math.inf and apart.diverges
    assert Twin([1.0, 1.0], [1.0, 1.1], [1.0, math.nan]).diverges
    for lengths in ((3, 3, 2), (3, 2, 3), (2, 3, 3), (0, 0, 0)):
        with pytest.raises(ValueError, match="three loss curves of one length"):
            Twin(*[[1.0] * n for n in lengths])


def test_the_floor_is_not_below_what_a_float32_loss_can_show():
    step = 2.0**-21  # between float32 numbers just above 4
    equal = Twin([4.0, 2.0], [4.0, 2.0], [4.0, 2.0])
    assert equal.floor == step / 2 and equal.ratio == 0.0 and not equal.diverges
    assert not Twin([4.0], [4.0], [4.0 + step]).diverges, "one rounding apart"
    far = Twin([4.0], [4.0], [4.0 + 100 * step])
    assert far.ratio == pytest.approx(200) and far.diverges
    assert Twin([4.0], [4.0 + 8 * step], [4.0]).floor == 8 * step, "what was measured, where that is more"


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
    far = torch.full_like(weight, math.inf)
    up, down = (torch.nextafter(torch.nextafter(before[0], to), to) for to in (far, -far))
    live = before[0] != 0
    assert bool(((weight <= up) & (weight >= down))[live].all())  # eps·|w| is one to two of the spacings at w
    assert 0.4 < float((weight != before[0])[live].double().mean()) < 0.95
    assert bool((weight > before[0]).any()) and bool((weight < before[0]).any())


def is_picture(path):
    content = path.read_bytes()
    return content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 10_000


def test_a_ledger_is_drawn_even_of_one_sample_without_numbers(tmp_path):
    numbers = {"norm_raw": 1.0, "cos_raw_inner": 0.9, "angle": 20.0, "lr_ratio": 1.0}
    records = [{"step": step, "loss": 1.0, "units": {"layer": dict(numbers)}} for step in (0, 5, 9)]
    evidence = Evidence(records, {}, False, False, {})
    assert is_picture(plot_ledger(evidence, tmp_path / "ledger.png", title="a run"))
    evidence.records[:] = [{"step": 0, "loss": None, "units": {"layer": dict.fromkeys(numbers)}}]
    assert is_picture(plot_ledger(evidence, tmp_path / "one.png"))


def test_twins_are_drawn(tmp_path):
    curve = [2 + 2 * math.exp(-i / 20) for i in range(60)]
    noisy, lower = [loss + 1e-6 * (-1) ** i for i, loss in enumerate(curve)], [0.9 * loss for loss in curve]
    for again, arm in ((curve, curve), (noisy, lower), (noisy, [*curve[:5], *[math.nan] * 55])):
        assert is_picture(plot_twin(Twin(curve, again, arm), tmp_path / "twin.png", name="pure_grit"))
