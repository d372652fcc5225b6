"""The same question as other people type it.

A data set asks in one form, and a model trained on one exact ending answers no other: `echo` puts a newline behind a
question, a person a blank or a question mark. So a share of what is learnt is varied, and split `paraphrased` asks
test and retention items again, each in one other form.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evaluation.tasks import Item

SPLIT = "paraphrased"
_BEHIND = {"newline": "\n", "blank": " "}
_AROUND = (("", "\n"), ("", " "), ("", "\n\n"), ("", "  "), (" ", ""), ("\n", ""), (" ", "\n"))


def varied(items: Sequence[Item], task: Any, share: float, seed: int) -> list[Item]:
    """The items, a share of them in other words where the task knows any, and with white space round them."""
    rng = random.Random(f"varied-{seed}")
    return [_varied(item, task, rng) if rng.random() < share and not item.whole else item for item in items]


def _varied(item: Item, task: Any, rng: random.Random) -> Item:
    for reword in getattr(task, "REWORDINGS", {}).values():
        if rng.random() < 0.5:
            item = replace(item, prompt=reword(item, rng))
    front, behind = rng.choice(_AROUND) if rng.random() < 0.6 else ("", "")
    return replace(item, prompt=front + item.prompt + behind)


def asked_again(items: Sequence[Item], task: Any, most: int, seed: int) -> list[Item]:
    """Up to `most` of the items, each in one form, the forms in turn; `<id>/<form>` names both."""
    rng = random.Random(f"asked-again-{seed}")
    rewordings = {**getattr(task, "REWORDINGS", {}), **getattr(task, "NEW_WORDINGS", {})}
    forms = [*_BEHIND, *rewordings]
    found = []
    questions = [item for item in items if not item.whole]  # a text that goes on has no other form
    for number, item in enumerate(rng.sample(questions, min(most, len(questions)))):
        form = forms[number % len(forms)]
        prompt = rewordings[form](item, rng) if form in rewordings else item.prompt + _BEHIND[form]
        if prompt != item.prompt:  # a prompt of the user's own, for which the task has no other words
            found.append(replace(item, id=f"{item.id}/{form}", prompt=prompt))
    return found


def plain(item_id: str) -> tuple[str, str]:
    """The item that one of split `paraphrased` asks again, and its form."""
    item, _, form = item_id.rpartition("/")
    return item, form
