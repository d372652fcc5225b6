"""Questions in BoolQ's form that the embedded base can learn.

`python examples/comparisons.py > inputs/comparisons.jsonl`, then `python -m pipelines.profile boolq+tiny`, and in
params.yaml `prepare_data.source: inputs/comparisons.jsonl`.
"""

import json
import random

NAMES = ("Ann", "Ben", "Eva", "Ida", "Leo", "Max", "Mia", "Tom")
THINGS = ("apples", "coins", "cups", "keys", "pens", "shells")


def main(count: int = 6000) -> None:
    """Write so many lines {question, passage, answer}, every passage once, half of the answers yes."""
    rng, seen = random.Random(0), set[str]()
    while len(seen) < count:
        names, thing = rng.sample(NAMES, 3), rng.choice(THINGS)
        numbers = rng.sample(range(1, 100), 3)
        passage = " ".join(f"{name} has {n} {thing}." for name, n in zip(names, numbers, strict=True))
        if passage in seen:
            continue
        seen.add(passage)
        (first, many), (second, few) = rng.sample(list(zip(names, numbers, strict=True)), 2)
        question = f"does {first} have more {thing} than {second}"
        print(json.dumps({"question": question, "passage": passage, "answer": many > few}))


if __name__ == "__main__":
    main()
