"""Schedules over the steps, and the shares of modalities and layers."""

import math

import pytest
import torch

from grit_vlm import GritVlmError
from grit_vlm.utils.projection import (
    MultiModalProjector,
    create_cosine_scheduler,
    create_linear_scheduler,
    create_scheduler,
    share_out,
)


@pytest.mark.parametrize(("start", "end"), [(32, 96), (96, 32), (5, 5)])
def test_schedules_go_from_start_to_end_and_stay_there(start, end):
    cosine = lambda t: (1 - math.cos(math.pi * t / 100)) / 2  # noqa: E731
    for make, share in ((create_linear_scheduler, lambda t: t / 100), (create_cosine_scheduler, cosine)):
        schedule = make(start, end, 100)
        between = [round(start + (end - start) * share(t)) for t in range(100)]
        assert [schedule.budget(t) for t in range(121)] == between + [end] * 21


def test_shares_go_to_the_largest_information():
    layers = [torch.tensor([9.0, 8.0, 0.1]), torch.tensor([7.0, 0.3, 0.2]), torch.tensor([0.01, 0.02])]
    for budget, expected in ((1, [1, 1, 1]), (4, [2, 1, 1]), (8, [3, 3, 2]), (99, [3, 3, 2])):
        assert share_out(layers, budget) == expected
    projector = MultiModalProjector()
    shares = projector.compute_mixed_modal_projection(layers[0], layers, k_vision=2, k_text=4)
    assert shares == {"vision": [2], "text": [2, 1, 1]}
    shares = projector.compute_mixed_modal_projection(None, layers[:1], layers[1:], k_text=2, k_cross=3)
    assert shares == {"text": [2], "cross_modal": [2, 1]}


def test_what_cannot_be_is_refused():
    for attempt, message in (
        (lambda: create_scheduler("linear", 0, 1.5, -3), "(?s)^start: .*\nend: .*\ntotal_steps: "),
        (lambda: share_out([torch.ones(4)], 0), "^budget: expected at least 1, got 0$"),
        (lambda: create_scheduler("liner", 1, 2, 3), "expected one of linear, cosine, got 'liner'"),
    ):
        with pytest.raises(GritVlmError, match=message):
            attempt()
