"""The retention suite of pretrained bases."""

import numpy as np
import pytest

from evaluation import knowledge
from evaluation.report.arms import FEWEST_RIGHT, that_it_knew
from evaluation.statistics.differences import Pairs
from evaluation.tasks import Item, general


def test_kinds_have_their_share_of_different_questions():
    items = knowledge.retention_items(10, seed=0)
    assert {item.task for item in items} == knowledge.NAMES and len({item.prompt for item in items}) == len(
        items
    ) == 140
    assert items == knowledge.retention_items(10, seed=0) != knowledge.retention_items(10, seed=1)
    assert knowledge.is_asked([item.id for item in items]) and not knowledge.is_asked(["retention-addition-0001"])


@pytest.mark.parametrize(
    ("kind", "prompt", "answer", "right"),
    [
        ("capitals", "What is the capital of France?", "The capital of France is Paris.", True),
        ("capitals", "What is the capital of France?", "paris", True),
        ("capitals", "What is the capital of France?", "Comparison of cities", False),
        ("how_many", "How many wheels does a car have?", "Four wheels", True),
        ("how_many", "How many wheels does a car have?", "14", False),
        ("kinds", "Is a dog an animal, a plant or a tool?", "A dog is an animal.", True),
        ("kinds", "Is a dog an animal, a plant or a tool?", "An animal, a plant or a tool", False),
        ("science", "What is the chemical symbol of carbon dioxide?", "It is CO2.", True),
    ],
)
def test_what_counts_as_right(kind, prompt, answer, right):
    item = next(item for item in knowledge.retention_items(99, seed=0) if item.prompt == prompt)
    assert item.task == kind and general.score(Item.from_json(item.to_json()), answer).correct is right


def test_only_what_the_base_has_right_counts_as_kept():
    base = np.array([[1.0] * FEWEST_RIGHT + [0.0] * 50])
    arm = np.array([[1.0] * (FEWEST_RIGHT // 2) + [0.0] * (FEWEST_RIGHT // 2) + [1.0] * 50])
    kept = that_it_knew(Pairs("base", (0,), arm, base))
    assert kept.credit.shape == (1, FEWEST_RIGHT) and kept.credit.mean() == 0.5
    assert that_it_knew(Pairs("base", (0,), arm[:, 1:], base[:, 1:])) is None, "too few to say anything"
