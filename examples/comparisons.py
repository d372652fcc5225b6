"""Questions in the format of BoolQ that the embedded base can learn.

`python examples/comparisons.py > inputs/comparisons.jsonl`, then `python -m pipelines.profile boolq+tiny`, and in
params.yaml `prepare_data.source: inputs/comparisons.jsonl`.
"""

import json
import random

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMES = ("Ann", "Ben", "Eva", "Ida", "Leo", "Max", "Mia", "Tom")
THINGS = ("apples", "coins", "cups", "keys", "pens", "shells")


def main(count: int = 6000) -> None:
    """Print lines {question, passage, answer}; passages are distinct, and about half of the answers are yes."""
    rng, seen = random.Random(0), set[str]()
    while len(seen) < count:
        name, thing, many, line = rng.choice(NAMES), rng.choice(THINGS), rng.randint(1, 99), rng.randint(1, 99)
        passage = f"On {rng.choice(DAYS)} {name} has {many} {thing}."
        if passage in seen or many == line:
            continue
        seen.add(passage)
        question = f"does {name} have more than {line} {thing}"
        print(json.dumps({"question": question, "passage": passage, "answer": many > line}))


if __name__ == "__main__":
    main()
