"""Schedules over the steps, and the shares of modalities and layers."""

import math

import pytest
import torch

from grit_vlm.utils.projection import (
    AdaptiveSchedule,
    MultiModalProjector,
    ProjectionError,
    create_adaptive_scheduler,
    create_cosine_scheduler,
    create_linear_scheduler,
    create_scheduler,
    effective_rank,
    recommended_budget,
)


@pytest.mark.parametrize("make", [create_linear_scheduler, create_cosine_scheduler])
@pytest.mark.parametrize(("start", "end"), [(32, 96), (96, 32), (5, 5)])
def test_schedules_go_from_start_to_end_and_stay_there(make, start, end):
    schedule = make(start, end, 100)
    budgets = [schedule.budget()] + [schedule.step() for _ in range(120)]
    assert budgets[0] == start and budgets[100:] == [end] * 21
    assert budgets == sorted(budgets, reverse=start > end)
    assert budgets == [schedule.budget(t) for t in range(121)]


def test_the_values_between():
    linear, cosine = create_linear_scheduler(0 + 1, 101, 100), create_cosine_scheduler(1, 101, 100)
    assert [linear.budget(t) for t in (25, 50, 75)] == [26, 51, 76]
    for t in range(101):
        assert cosine.budget(t) == round(1 + 100 * (1 - math.cos(math.pi * t / 100)) / 2)
    assert cosine.budget(10) < linear.budget(10) and cosine.budget(90) > linear.budget(90)


def run(schedule, losses):
    budgets = [schedule.budget()]
    for loss in losses:
        schedule.observe(loss)
        budgets.append(schedule.step())
    return budgets


def test_the_adaptive_schedule_reacts_to_a_plateau_alone():
    falling = run(create_adaptive_scheduler(10, 110, 200), [math.exp(-0.01 * t) for t in range(200)])
    assert set(falling) == {10}
    still = run(create_adaptive_scheduler(10, 110, 200), [1.0] * 200)
    assert still[:21] == [10] * 20 + [20]  # the second window of ten steps has brought nothing
    assert still == sorted(still) and still[-1] == 110
    rising = run(create_adaptive_scheduler(10, 110, 200), [1.0 + 0.01 * t for t in range(200)])
    assert rising == still
    then = run(create_adaptive_scheduler(10, 110, 200), [math.exp(-0.01 * min(t, 100)) for t in range(200)])
    assert then[100] == 10 and then[-1] > 50


def test_the_adaptive_schedule_ignores_what_is_no_loss():
    schedule = AdaptiveSchedule(10, 110, 40)
    assert run(schedule, [1.0, 1.0, math.nan, math.inf]) == [10] * 5


@pytest.mark.parametrize("kind", ["linear", "cosine", "adaptive"])
def test_a_schedule_goes_on_from_its_state(kind):
    losses = [1.0 - 0.001 * t for t in range(60)]
    whole = run(create_scheduler(kind, 4, 60, 60), losses)
    first, second = create_scheduler(kind, 4, 60, 60), create_scheduler(kind, 1, 2, 3)
    budgets = run(first, losses[:31])
    second.load_state_dict(first.state_dict())
    assert budgets[:-1] + run(second, losses[31:]) == whole
    assert len(set(whole)) > 3


def test_schedules_refuse_what_cannot_be():
    with pytest.raises(ProjectionError) as caught:
        create_scheduler("linear", 0, 1.5, -3)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["start", "end", "total_steps"]
    with pytest.raises(ProjectionError, match="expected one of linear, cosine, adaptive, got 'liner'"):
        create_scheduler("liner", 1, 2, 3)


def test_effective_rank():
    torch.manual_seed(0)
    assert effective_rank(torch.eye(6).repeat(3, 1)) == pytest.approx(6)
    low = torch.randn(4, 50, 2) @ torch.randn(2, 8)
    assert 1 < effective_rank(low) <= 2.001
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1, abs=1e-4)
    assert recommended_budget(torch.eye(6)) == 7  # 1.2 · 6
    assert recommended_budget(torch.ones(5, 3)) == 1
    with pytest.raises(ProjectionError, match="at least one sample"):
        effective_rank(torch.zeros(0, 4))


# Shares


def values(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=generator) for n in sizes]


def test_shares_go_to_the_largest_information():
    layers = [torch.tensor([9.0, 8.0, 0.1]), torch.tensor([7.0, 0.3, 0.2]), torch.tensor([0.01, 0.02])]
    shares = MultiModalProjector().share_out({"text": layers}, {"text": 4})
    assert shares == {"text": [2, 1, 1]}  # 9, 8, 7, and one of the last layer as each has one at least


@pytest.mark.parametrize("budgets", [(3, 2, 1), (10, 20, 5), (40, 1, 1), (1, 60, 1), (500, 7, 9)])
def test_shares_sum_up_to_the_budgets_where_there_is_room(budgets):
    given = dict(zip(("vision", "text", "cross_modal"), (values(9, 20), values(5, 6, 30, seed=1), values(12, seed=2)),
                     strict=True))  # fmt: skip
    asked = dict(zip(given, budgets, strict=True))
    shares = MultiModalProjector().share_out(given, asked)
    room = sum(t.numel() for layers in given.values() for t in layers)
    least = {name: len(layers) for name, layers in given.items()}
    if all(asked[name] >= least[name] for name in given):
        assert sum(map(sum, shares.values())) == min(sum(budgets), room)
    for name, layers in given.items():
        assert all(1 <= k <= t.numel() for k, t in zip(shares[name], layers, strict=True))
        assert sum(shares[name]) >= min(asked[name], sum(t.numel() for t in layers))


def test_what_a_modality_has_no_use_for_goes_to_the_others_in_proportion():
    given = {"vision": values(4), "text": values(1000), "cross_modal": values(1000)}
    shares = MultiModalProjector().share_out(given, {"vision": 64, "text": 40, "cross_modal": 20})
    assert shares == {"vision": [4], "text": [80], "cross_modal": [40]}


def test_the_documents_call():
    projector = MultiModalProjector()
    shares = projector.compute_mixed_modal_projection(values(8)[0], values(8, 8), k_vision=3, k_text=5)
    assert shares["vision"] == [3] and sum(shares["text"]) == 5 and set(shares) == {"vision", "text"}
    shares = projector.compute_mixed_modal_projection(None, values(8), values(6), k_text=2, k_cross=3)
    assert shares == {"text": [2], "cross_modal": [3]}


def test_impossible_shares_are_all_named():
    with pytest.raises(ProjectionError) as caught:
        MultiModalProjector().share_out(
            {"vision": values(4), "text": [torch.zeros(0)], "fusion": values(3)}, {"vision": 0, "text": 3, "fusion": 2}
        )
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["budget of vision", "text"]
