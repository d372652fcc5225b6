"""Air quality: "Predict AQI given: …", scored against the US EPA index.

Generated items cover the six categories equally often, with one to several pollutants and several wordings. Two items
with the same readings never land in different splits, however they are worded or ordered. Rows of your own data may
contain readings, the index, or questions and answers to be used verbatim.
"""

import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from evaluation import EvaluationError, epa
from evaluation.sources.agencies import as_published as as_published
from evaluation.sources.agencies import index_values as index_values
from evaluation.tasks import (
    Field,
    Item,
    RowError,
    Score,
    is_missing,
    mean,
    metric,
    number,
    repunctuate,
    share,
    text_or_number,
)
from trainers.words import nearest

T = TypeVar("T")
NAME = "aqi"
TITLE = "AQI accuracy"
PRIMARY = "aqi_category_accuracy"
METRICS = {
    "aqi_category_accuracy": share("Share of items whose predicted number lies in the true EPA category (primary)"),
    "aqi_exact": share("Share of items whose predicted number equals the true index"),
    "aqi_within_10": share("Share of items predicted within 10 index points"),
    "aqi_mae": metric(
        "index points", "lower", "Mean absolute error over the items whose answer has a number; NaN if none has"
    ),
    "aqi_unparseable": share("Share of items whose answer has no index from 0 to 500", "lower"),
    "aqi_label_agrees": share("Share of items whose answer names the category that its own number lies in"),
}

SETTINGS = ("pollutants", "max_pollutants")
ROW_SETTINGS = ("trust_given_aqi",)  # use the file's index even if it disagrees with EPA's calculation
FIELDS = {
    **{
        key: Field(
            None, False, f"concentration of {pollutant.label}", pollutant.unit, pollutant.typical, pollutant.molar_mass
        )
        for key, pollutant in epa.POLLUTANTS.items()
    },
    "aqi": Field(None, False, "the index", typical=(0, epa.AQI_MAX)),
    "category": Field(None, False, "EPA's name for the category"),
    "id": Field(None, False, "a name for the row"),
    "prompt": Field(None, False, "a question to be asked verbatim"),
    "completion": Field(None, False, "its answer"),
}
AQI_TOLERANCE = 1  # index points; other tools round halves to even, or use the breakpoints from before May 2024
LARGEST = 1_000_000  # in any of EPA's units; every scale ends far below it, and decimal arithmetic not far above

# {readings} is a comma-separated list; every wording begins the same way.
WORDINGS = (
    "Predict AQI given: {readings}",
    "Predict AQI given: measured {readings}",
    "Predict AQI given: in the air {readings}",
)
READINGS = ("{label} {value} {unit}", "{label}: {value} {unit}", "{label} = {value} {unit}")
# What other people would type: variations for training items, and wordings reserved for split `paraphrased`.
OTHER_WORDINGS = (
    *WORDINGS, "Predict the AQI for {readings}", "Predict the AQI given {readings}", "predict aqi given: {readings}",
    "What is the AQI for {readings}", "What is the AQI with {readings}", "AQI for {readings}",
)  # fmt: skip
UNTRAINED_WORDINGS = ("How high is the AQI at {readings}", "AQI of {readings}", "Tell me the AQI for {readings}")
OTHER_READINGS = (
    *READINGS, "{label} {value}{unit}", "{label}: {value}{unit}", "{label}={value}{unit}", "{label} of {value} {unit}",
)  # fmt: skip
SEPARATORS = (", ", " and ", "; ", ",")

Key = tuple[tuple[str, str], ...]
Readings = Mapping[str, epa.Value]


def item_key(readings: Readings) -> Key:
    """Readings in a canonical form: sorted, each truncated to EPA's precision."""
    return tuple(sorted((k, str(epa.POLLUTANTS[k].truncate(v))) for k, v in readings.items()))


def completion(index: int) -> str:
    """The answer to train on: category and number.

    The category comes first because its first token already decides the class, while a number's first digit does not
    (1 begins 12 and 126): small models learn this order faster (docs/log/2026-11-21.md).
    """
    return f"{epa.category(index)}: {index}"


def _reading(key: str, value: epa.Value, style: str) -> str:
    pollutant = epa.POLLUTANTS[key]
    return style.format(label=pollutant.label, value=pollutant.truncate(value), unit=pollutant.unit)


def item_of(item_id: str, readings: Readings, rng: random.Random) -> Item:
    """An item with its exact EPA truth and a wording drawn from `rng`."""
    order = list(readings)
    rng.shuffle(order)
    index = epa.aqi(readings)
    wording, style = rng.choice(WORDINGS), rng.choice(READINGS)
    prompt = wording.format(readings=", ".join(_reading(key, readings[key], style) for key in order))
    return Item(item_id, NAME, prompt, completion(index), _truth(index, readings))


def reword(item: Item, rng: random.Random, wordings: Sequence[str] = OTHER_WORDINGS) -> str:
    """The same readings in another wording, order and format; a prompt of the user's own stays unchanged."""
    readings = item.truth.get("readings")
    if not readings or not _is_generated(item.prompt, readings):
        return item.prompt
    order = list(readings)
    rng.shuffle(order)
    style, separator = rng.choice(OTHER_READINGS), rng.choice(SEPARATORS)
    return rng.choice(wordings).format(readings=separator.join(_reading(key, readings[key], style) for key in order))


def _is_generated(prompt: str, readings: Mapping[str, str]) -> bool:
    """Whether `item_of` could have made this prompt of these readings."""
    openings = [wording.removesuffix("{readings}") for wording in WORDINGS]
    lists = [sorted(prompt.removeprefix(opening).split(", ")) for opening in openings if prompt.startswith(opening)]
    return any(sorted(_reading(key, readings[key], style) for key in readings) in lists for style in READINGS)


REWORDINGS = {"wording": reword, "mark": repunctuate}
NEW_WORDINGS = {"new wording": partial(reword, wordings=UNTRAINED_WORDINGS)}


def _truth(index: int, readings: Mapping[str, object]) -> dict[str, Any]:
    return {"aqi": index, "category": epa.category(index), "readings": {k: str(v) for k, v in readings.items()}}


# --- rows of the user's own data ---


def check_mapping(fields: Collection[str]) -> list[str]:
    if not fields:  # the file may be an agency's
        return []
    texts = sorted({"prompt", "completion"}.intersection(fields))
    if len(texts) == 1:
        return [f"only {texts[0]!r} is mapped; prompt and completion come together."]
    if texts and "aqi" not in fields:
        return ["prompt and completion are mapped without 'aqi'; map the column with the true index."]
    if not texts and not epa.POLLUTANTS.keys() & set(fields):
        pollutants = ", ".join(epa.POLLUTANTS)
        return [f"columns maps no pollutant; map at least one of {pollutants}, or prompt, completion and aqi."]
    return []


def make_item(item_id: str, row: Mapping[str, Any]) -> Item:
    """An item of a row's readings (equal ones, as EPA truncates them, give one prompt), or of its texts and index."""
    problems: list[tuple[str | None, str]] = []

    def read(name: str, parse: Callable[[Any], T]) -> T | None:
        """The field's value; None if it is missing, or if it is unusable, which is added to `problems`."""
        try:
            return None if is_missing(row.get(name)) else parse(row[name])
        except ValueError as error:
            problems.append((name, str(error)))
            return None

    cells = {key: read(key, partial(_concentration, key)) for key in epa.POLLUTANTS}
    readings = {key: value for key, value in cells.items() if value is not None}
    given = read("aqi", _index)
    computed = None
    if readings and not problems:
        problems += _reading_problems(readings)
        computed = None if problems else epa.aqi(readings)
    indices = [index for index in (given, computed) if index is not None]
    if not row.get("trust_given_aqi") and len(indices) == 2 and abs(indices[0] - indices[1]) > AQI_TOLERANCE:
        problems.append(("aqi", f"the given AQI is {given}, EPA's calculation from the readings gives {computed}"))
    category = read("category", _category)
    if category and indices and category not in map(epa.category, indices):
        numbers = " or ".join(map(str, sorted(set(indices))))
        right = epa.category(max(indices))
        problems.append(("category", f"the given category is {category}, an AQI of {numbers} is {right}"))
    texts = {name: row[name] for name in ("prompt", "completion") if name in row}
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            problems.append((name, f"expected a text, got {'nothing' if text is None or text == '' else repr(text)}"))
    if not problems and texts and given is None:
        problems.append(("aqi", "is missing; answers are scored against it"))
    elif not problems and not texts and not readings:
        names = ", ".join(key for key in epa.POLLUTANTS if key in row)
        problems.append((None, f"no reading: all of {names} are missing"))
    if problems:
        raise RowError(*problems[0], *problems[1:])
    name = item_id if is_missing(row.get("id")) else text_or_number(row, "id")
    prompt = item_of(item_id, readings, random.Random(repr(item_key(readings)))).prompt if readings else ""
    truth = _truth(indices[0], readings)
    if not readings:
        del truth["readings"]
    return Item(name, NAME, texts.get("prompt", prompt), texts.get("completion", completion(indices[0])), truth)


def group(item: Item) -> Hashable:
    readings = item.truth.get("readings")
    return item_key(readings) if readings else item.prompt


def _number(value: object, *, most: int, beyond: str) -> Decimal:
    result = number(value)
    if result > most:
        raise ValueError(f"{beyond}, got {value}")
    return result


def _concentration(key: str, value: object) -> Decimal:
    """A reading in EPA's unit. Instruments report a little less than nothing, which EPA counts as an index of 0."""
    reading = number(value, signed=True)
    good = next(band for band in epa.POLLUTANTS[key].bands if band)
    if -good[1] <= reading < 0:  # below: a mark such as -999
        return Decimal(0)
    return _number(value, most=LARGEST, beyond="is far off EPA's scale")


def _index(value: object) -> int:
    index = _number(value, most=epa.AQI_MAX, beyond=f"expected an index in 0..{epa.AQI_MAX}")
    return int(index.quantize(Decimal(1), rounding=ROUND_HALF_UP))


def _category(value: object) -> str:
    category = {c.lower(): c for c in epa.CATEGORIES}.get(str(value).strip().lower())
    if category is None:
        near = nearest(str(value), epa.CATEGORIES)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(f"expected one of {', '.join(epa.CATEGORIES)}, got {value!r}{hint}")
    return category


def _reading_problems(readings: Readings) -> list[tuple[str | None, str]]:
    """Why readings have no index, blamed on the ones at fault; empty if they have one."""

    def problem(of: Readings) -> str:
        try:
            epa.aqi(of)
        except ValueError as error:
            return str(error)
        return ""

    if not (whole := problem(readings)):
        return []
    good = {key: value for key, value in readings.items() if not problem({key: value})}
    # With the good ones beside it, because EPA skips some ozone values if another reading counts.
    others = {key: problem({**good, key: value}) for key, value in readings.items() if key not in good}
    return [(key, why) for key, why in others.items() if why] or [(None, whole)]


# --- generated items ---


def _draw_value(rng: random.Random, key: str, band: int) -> Decimal:
    pollutant = epa.POLLUTANTS[key]
    edges = pollutant.bands[band]
    if edges is None:
        raise ValueError(f"{pollutant.label} has no band {band}")
    scale = 10**pollutant.decimals
    return Decimal(rng.randint(int(edges[0] * scale), int(edges[1] * scale))).scaleb(-pollutant.decimals)


def _draw_readings(rng: random.Random, category: int, pollutants: Sequence[str], size: int) -> dict[str, Decimal]:
    """Readings of `size` pollutants whose overall category has number `category`."""
    leader = rng.choice([k for k in pollutants if epa.POLLUTANTS[k].bands[category] is not None])
    readings = {leader: _draw_value(rng, leader, category)}
    others = [k for k in pollutants if k != leader]
    rng.shuffle(others)
    for key in others:
        if len(readings) == size:
            break
        bands = [b for b in range(category + 1) if epa.POLLUTANTS[key].bands[b] is not None]
        if bands:
            readings[key] = _draw_value(rng, key, rng.choice(bands))
    return readings


def ends(held: Mapping[str, int]) -> list[float]:
    """Upper end of each split's share, where all together are 1."""
    return [sum(list(held.values())[: number + 1]) / sum(held.values()) for number in range(len(held))]


def pools_of(sizes: Mapping[str, int]) -> list[tuple[str, float]]:
    """Split → upper end of its share of the hashes.

    The splits other than train share a fifth. That is several times their size, or they would use up the simple items.
    """
    held = {split: n for split, n in sizes.items() if split != "train"}
    share = 0.2 if "train" in sizes else 1.0
    return [*zip(held, [share * end for end in ends(held)], strict=True), ("train", 1.0)]


def split_of(key: object, pools: Sequence[tuple[str, float]]) -> str:
    position = zlib.crc32(repr(key).encode()) / 2**32
    return next((split for split, end in pools if position < end), pools[-1][0])


def generate(
    sizes: Mapping[str, int], *, seed: int, pollutants: Sequence[str], max_pollutants: int, folder: Path | None = None
) -> dict[str, list[Item]]:
    """Items of each split (name → how many) over one to `max_pollutants` pollutants; the same seed, the same items.

    Categories are equally frequent as far as the pollutants allow; each further pollutant makes a question a third as
    frequent. Readings belong to one split and occur once in it, except in "train", where the wordings differ.
    EvaluationError if the pollutants do not offer enough different questions.
    """
    rng = random.Random(f"aqi-{seed}")
    pools = pools_of(sizes)
    categories = [c for c in range(len(epa.CATEGORIES)) if any(epa.POLLUTANTS[k].bands[c] for k in pollutants)]
    most = min(max_pollutants, len(pollutants))
    lengths, weights = range(1, most + 1), [3.0**-k for k in range(most)]
    splits: dict[str, list[Item]] = {}
    for split, n in sizes.items():
        seen: set[Key | str] = set()
        items: list[Item] = []
        misses = 0
        while len(items) < n:
            category = categories[len(items) % len(categories)]
            readings = _draw_readings(rng, category, pollutants, rng.choices(lengths, weights)[0])
            key = item_key(readings)
            if split_of(key, pools) != split:
                continue
            item = item_of(f"aqi-{split}-{len(items):05d}", readings, rng)
            mark: Key | str = item.prompt if split == "train" else key
            if mark in seen:
                misses += 1
                if misses > 20 * n + 1000:
                    raise EvaluationError(
                        f"expected {n} different {split} items, got {len(items)} with pollutants "
                        f"{', '.join(pollutants)}. Ask for fewer items, more pollutants or a larger max_pollutants"
                    )
                continue
            seen.add(mark)
            items.append(item)
        rng.shuffle(items)
        splits[split] = items
    return splits


# --- scoring ---

# A whole number from 0 to 999 that is not part of a decimal, a longer number or a name such as PM10 or "8h".
_NUMBER = re.compile(r"(?<![\w.,-])([0-9]{1,3})(?![\w]|[.,]\d)")


def parse(answer: str) -> int | None:
    """The predicted index: the first whole number from 0 to 500 in the answer, or None.

    If the answer says "AQI" or "index", numbers after the last mention take precedence, so that a model which repeats
    the readings before it answers is read correctly.
    """
    mention = max(answer.upper().rfind("AQI"), answer.lower().rfind("index"))
    for text in (answer[mention:] if mention >= 0 else "", answer):
        for match in _NUMBER.finditer(text):
            if int(match.group(1)) <= epa.AQI_MAX:
                return int(match.group(1))
    return None


LONGEST_FIRST = sorted(epa.CATEGORIES, key=len, reverse=True)  # the shorter names are parts of the longer ones


def named_category(answer: str) -> str | None:
    lower = answer.casefold()
    return next((c for c in LONGEST_FIRST if c.casefold() in lower), None)


def score(item: Item, answer: str) -> Score:
    truth = int(item.truth["aqi"])
    predicted = parse(answer)
    if predicted is None:
        return Score(correct=False, predicted=None, exact=False, remark="no number")
    category, named, off = epa.category(predicted), named_category(answer), abs(predicted - truth)
    correct = category == epa.category(truth)
    remarks = [f"number {off} off"] if off else []
    if not correct:
        remarks.append(f"{predicted} is {category}")
    elif off:
        remarks.insert(0, "category right")
    if named not in (None, category):
        remarks.append(f"its label is {named}")
    return Score(
        correct=correct,
        predicted=predicted,
        exact=predicted == truth,
        abs_error=off,
        label_agrees=named == category,
        remark=", ".join(remarks),
    )


def summarize(scores: list[Score]) -> dict[str, float]:
    errors = [s.abs_error for s in scores if s.abs_error is not None]
    return {
        "aqi_category_accuracy": mean(s.correct for s in scores),
        "aqi_exact": mean(s.exact for s in scores),
        "aqi_within_10": mean(s.abs_error is not None and s.abs_error <= 10 for s in scores),
        "aqi_mae": mean(errors),
        "aqi_unparseable": mean(s.predicted is None for s in scores),
        "aqi_label_agrees": mean(s.label_agrees for s in scores),
    }


def facts(items: Sequence[Item]) -> dict[str, Any]:
    counts = Counter(str(item.truth["category"]) for item in items)
    return {"test_categories": {c: counts[c] for c in epa.CATEGORIES}}
