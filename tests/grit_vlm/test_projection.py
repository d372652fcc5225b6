"""Schedules over the steps, and the shares of modalities and layers."""

import math

import pytest
import torch

from grit_vlm import GritVlmError
from grit_vlm.utils.projection import (
    MultiModalProjector,
    create_adaptive_scheduler,
    create_cosine_scheduler,
    create_linear_scheduler,
    create_scheduler,
    effective_rank,
    recommended_budget,
)


@pytest.mark.parametrize(("start", "end"), [(32, 96), (96, 32), (5, 5)])
def test_schedules_go_from_start_to_end_and_stay_there(start, end):
    cosine = lambda t: (1 - math.cos(math.pi * t / 100)) / 2  # noqa: E731
    for make, share in ((create_linear_scheduler, lambda t: t / 100), (create_cosine_scheduler, cosine)):
        schedule = make(start, end, 100)
        between = [round(start + (end - start) * share(t)) for t in range(100)]
        assert [schedule.budget(t) for t in range(121)] == between + [end] * 21


def run(schedule, losses):
    budgets = [schedule.budget(0)]
    for step, loss in enumerate(losses, 1):
        schedule.observe(loss)
        budgets.append(schedule.budget(step))
    return budgets


def test_the_adaptive_schedule_reacts_to_a_plateau_alone():
    falling = run(create_adaptive_scheduler(10, 110, 200), [math.exp(-0.01 * t) for t in range(200)])
    assert set(falling) == {10}
    still = run(create_adaptive_scheduler(10, 110, 200), [1.0] * 200)
    assert still[:21] == [10] * 20 + [20]  # the second window of ten steps has brought nothing
    assert still == sorted(still) and still[-1] == 110
    then = run(create_adaptive_scheduler(10, 110, 200), [math.exp(-0.01 * min(t, 100)) for t in range(200)])
    assert then[100] == 10 and then[-1] > 50
    assert run(create_adaptive_scheduler(10, 110, 40), [1.0, 1.0, math.nan, math.inf]) == [10] * 5  # no losses


def test_effective_rank():
    torch.manual_seed(0)
    assert effective_rank(torch.eye(6).repeat(3, 1)) == pytest.approx(6)
    assert 1 < effective_rank(torch.randn(4, 50, 2) @ torch.randn(2, 8)) <= 2.001
    assert recommended_budget(torch.eye(6)) == 7  # 1.2 · 6
    assert recommended_budget(torch.ones(5, 3)) == 1
    with pytest.raises(GritVlmError, match="at least one sample"):
        effective_rank(torch.zeros(0, 4))


def test_shares_go_to_the_largest_information():
    layers = [torch.tensor([9.0, 8.0, 0.1]), torch.tensor([7.0, 0.3, 0.2]), torch.tensor([0.01, 0.02])]
    projector = MultiModalProjector()
    for budget, expected in ((1, [1, 1, 1]), (4, [2, 1, 1]), (8, [3, 3, 2]), (99, [3, 3, 2])):
        assert projector.share_out({"text": layers}, {"text": budget}) == {"text": expected}
    layer = [torch.arange(1000.0)]
    given = {"vision": [torch.ones(4)], "text": layer, "cross_modal": layer}
    shares = projector.share_out(given, {"vision": 64, "text": 40, "cross_modal": 20})
    assert shares == {"vision": [4], "text": [80], "cross_modal": [40]}, "what is over goes to others, in proportion"
    shares = projector.compute_mixed_modal_projection(layers[0], layers, k_vision=2, k_text=4)
    assert shares == {"vision": [2], "text": [2, 1, 1]}
    shares = projector.compute_mixed_modal_projection(None, layers[:1], layers[1:], k_text=2, k_cross=3)
    assert shares == {"text": [2], "cross_modal": [2, 1]}


def test_what_cannot_be_is_refused():
    layers, budgets = {"vision": [torch.ones(4)], "text": [torch.ones(2)]}, {"vision": 0, "text": 3}
    for attempt, message in (
        (lambda: create_scheduler("linear", 0, 1.5, -3), "(?s)^start: .*\nend: .*\ntotal_steps: "),
        (lambda: MultiModalProjector().share_out(layers, budgets), "^budget of vision: expected at least 1, got 0$"),
        (lambda: create_scheduler("liner", 1, 2, 3), "expected one of linear, cosine, adaptive, got 'liner'"),
    ):
        with pytest.raises(GritVlmError, match=message):
            attempt()
