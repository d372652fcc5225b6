"""Air quality: "Predict AQI given: …", scored against the US EPA index.

Drawn items have the six categories equally often, over one to several pollutants and in several wordings. Two items
with the same readings never land in different splits, however they are worded or ordered. Rows of a user's own data may
hold readings, the index, or questions and answers as they are.
"""

import random
import re
import zlib
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from functools import partial
from pathlib import Path
from typing import Any

from evaluation import epa
from evaluation.tasks import Field, Item, ItemError, RowError, Score, is_missing, marked, mean, metric, number, share
from trainers.words import nearest

NAME = "aqi"
TITLE = "AQI accuracy"
PRIMARY = "aqi_category_accuracy"
METRICS = {
    "aqi_category_accuracy": share("Share of items whose predicted number lies in the true EPA category (primary)"),
    "aqi_exact": share("Share of items whose predicted number equals the true index"),
    "aqi_within_10": share("Share of items predicted within 10 index points"),
    "aqi_mae": metric(
        "index points",
        "lower",
        "Mean absolute error over the items from which a number could be read; NaN where none could",
    ),
    "aqi_unparseable": share("Share of items whose answer holds no index from 0 to 500", "lower"),
    "aqi_label_agrees": share("Share of items whose answer names the category that its own number lies in"),
}

SETTINGS = ("pollutants", "max_pollutants")
ROW_SETTINGS = ("trust_given_aqi",)  # take the file's index where it disagrees with EPA's calculation
FIELDS = {
    **{
        key: Field(None, False, f"concentration of {pollutant.label}", pollutant.unit, pollutant.typical)
        for key, pollutant in epa.POLLUTANTS.items()
    },
    "aqi": Field(None, False, "the index", typical=(0, epa.AQI_MAX)),
    "category": Field(None, False, "EPA's name of the category"),
    "id": Field(None, False, "a name of the row"),
    "prompt": Field(None, False, "a question as it is to be asked"),
    "completion": Field(None, False, "its answer"),
}
AQI_TOLERANCE = 1  # index points; other tools round halves to even or use the breakpoints of before May 2024
LARGEST = 1e6  # in any of EPA's units; every scale ends far below, and decimal arithmetic not far above

# {readings} is a comma-separated list; every wording begins alike.
WORDINGS = (
    "Predict AQI given: {readings}",
    "Predict AQI given: measured {readings}",
    "Predict AQI given: in the air {readings}",
)
READINGS = ("{label} {value} {unit}", "{label}: {value} {unit}", "{label} = {value} {unit}")
# As other people put it: what training items are varied with, and what is kept for split `paraphrased` alone.
OTHER_WORDINGS = (
    *WORDINGS, "Predict the AQI for {readings}", "Predict the AQI given {readings}", "predict aqi given: {readings}",
    "What is the AQI for {readings}", "What is the AQI with {readings}", "AQI for {readings}",
)  # fmt: skip
UNTRAINED_WORDINGS = ("How high is the AQI at {readings}", "AQI of {readings}", "Tell me the AQI for {readings}")
OTHER_READINGS = (
    *READINGS, "{label} {value}{unit}", "{label}: {value}{unit}", "{label}={value}{unit}", "{label} of {value} {unit}",
)  # fmt: skip
BETWEEN = (", ", " and ", "; ", ",")

Key = tuple[tuple[str, str], ...]


def item_key(readings: Mapping[str, float | str | Decimal]) -> Key:
    """Readings in one canonical form: sorted, each cut to the precision that EPA looks at."""
    return tuple(sorted((k, str(epa.POLLUTANTS[k].truncate(v))) for k, v in readings.items()))


def completion(index: int) -> str:
    """The answer trained on: category and number.

    The category comes first because its first token already is a class, where a number's first digit is not (1 begins
    12 and 126): small models learn this order faster (LOG.md, 2026-11-21).
    """
    return f"{epa.category(index)}: {index}"


def prompt(readings: Mapping[str, float | str | Decimal], wording: str, style: str, order: Sequence[str]) -> str:
    return wording.format(readings=", ".join(_reading(key, readings[key], style) for key in order))


def _reading(key: str, value: float | str | Decimal, style: str) -> str:
    pollutant = epa.POLLUTANTS[key]
    return style.format(label=pollutant.label, value=pollutant.truncate(value), unit=pollutant.unit)


def item_of(item_id: str, readings: Mapping[str, float | str | Decimal], rng: random.Random) -> Item:
    """An item with its exact EPA truth and a wording drawn from `rng`."""
    order = list(readings)
    rng.shuffle(order)
    index = epa.aqi(readings)
    asked = prompt(readings, rng.choice(WORDINGS), rng.choice(READINGS), order)
    return Item(item_id, NAME, asked, completion(index), _truth(index, readings))


def reworded(item: Item, rng: random.Random, wordings: Sequence[str] = OTHER_WORDINGS) -> str:
    """The same readings in another wording, order and form; a prompt of the user's own stays as it is."""
    readings = item.truth.get("readings")
    if not readings or not _ours(item.prompt, readings):
        return item.prompt
    order = list(readings)
    rng.shuffle(order)
    style, between = rng.choice(OTHER_READINGS), rng.choice(BETWEEN)
    return rng.choice(wordings).format(readings=between.join(_reading(key, readings[key], style) for key in order))


def _ours(asked: str, readings: Mapping[str, str]) -> bool:
    """Whether a prompt is one that `prompt` makes of these readings."""
    openings = [wording.removesuffix("{readings}") for wording in WORDINGS]
    said = [sorted(asked.removeprefix(opening).split(", ")) for opening in openings if asked.startswith(opening)]
    return any(sorted(_reading(key, readings[key], style) for key in readings) in said for style in READINGS)


REWORDINGS = {"wording": reworded, "mark": marked}
NEW_WORDINGS = {"new wording": partial(reworded, wordings=UNTRAINED_WORDINGS)}


def _truth(index: int, readings: Mapping[str, object]) -> dict[str, Any]:
    return {"aqi": index, "category": epa.category(index), "readings": {k: str(v) for k, v in readings.items()}}


# --- rows of a user's own data ---

_Problems = list[tuple[str | None, str]]


def check_mapping(fields: Collection[str]) -> list[str]:
    texts = sorted({"prompt", "completion"}.intersection(fields))
    if len(texts) == 1:
        return [f"{texts[0]!r} is mapped alone; prompt and completion come together."]
    if texts and "aqi" not in fields:
        return ["prompt and completion are mapped without 'aqi'; map the column that holds the true index."]
    if not texts and not epa.POLLUTANTS.keys() & set(fields):
        known = ", ".join(epa.POLLUTANTS)
        return [f"columns maps no pollutant; map at least one of {known}, or prompt, completion and aqi."]
    return []


def make_item(item_id: str, row: Mapping[str, Any]) -> Item:
    """An item of a row's readings (equal ones, as EPA cuts them, give one prompt), or of its own texts and index."""
    problems: _Problems = []
    cells = {key: _number_in(row, key, LARGEST, "is far off EPA's scale", problems) for key in epa.POLLUTANTS}
    readings = {key: value for key, value in cells.items() if value is not None}
    index = _number_in(row, "aqi", epa.AQI_MAX, f"expected an index in 0..{epa.AQI_MAX}", problems)
    given = None if index is None else int(Decimal(repr(index)).quantize(Decimal(1), rounding=ROUND_HALF_UP))
    computed = _computed(readings, problems) if readings and not problems else None
    trusted = row.get("trust_given_aqi")
    if not trusted and computed is not None and given is not None and abs(computed - given) > AQI_TOLERANCE:
        problems.append(("aqi", f"the given AQI is {given}, EPA's calculation of the readings gives {computed}"))
    _check_category(row, {i for i in (given, computed) if i is not None}, problems)
    own = {name: _own_text(row, name, problems) for name in ("prompt", "completion") if name in row}
    if not problems and own and given is None:
        problems.append(("aqi", "is missing; it is the truth that an answer is scored by"))
    elif not problems and not own and not readings:
        named = ", ".join(key for key in epa.POLLUTANTS if key in row)
        problems.append((None, f"no reading: all of {named} are missing"))
    if problems:
        raise RowError(*problems[0], *problems[1:])
    truth_index = given if given is not None else computed
    if truth_index is None:
        raise RowError("aqi", "neither readings nor an index to score against")
    name = None if is_missing(row.get("id")) else str(row["id"]).strip()
    made = item_of(item_id, readings, random.Random(repr(item_key(readings)))) if readings else None
    truth = _truth(truth_index, readings)
    if not readings:
        del truth["readings"]
    asked = own.get("prompt") or (made.prompt if made else "")
    return Item(name or item_id, NAME, asked, own.get("completion") or completion(truth_index), truth)


def group(item: Item) -> Hashable:
    readings = item.truth.get("readings")
    return item_key(readings) if readings else item.prompt


def _number_in(row: Mapping[str, Any], name: str, most: float, beyond: str, problems: _Problems) -> float | None:
    """The number of a field; None where it is missing or, with a problem noted, none that can be used."""
    value = row.get(name)
    if is_missing(value):
        return None
    try:
        found = number(value)
    except ValueError as error:
        problems.append((name, str(error)))
        return None
    if found > most:
        problems.append((name, f"{beyond}, got {value}"))
        return None
    return found


def _fault(readings: Mapping[str, float]) -> str | None:
    try:
        epa.aqi(readings)
    except ValueError as error:
        return str(error)
    return None


def _computed(readings: dict[str, float], problems: _Problems) -> int | None:
    """EPA's index; where there is none, the readings at fault are named."""
    fault = _fault(readings)
    if fault is None:
        return epa.aqi(readings)
    sound = {key: value for key, value in readings.items() if _fault({key: value}) is None}
    # EPA passes some ozone values over when another one counts.
    beside = {key: _fault({**sound, key: value}) for key, value in readings.items() if key not in sound}
    problems += [(key, said) for key, said in beside.items() if said] or [(None, fault)]
    return None


def _check_category(row: Mapping[str, Any], indices: set[int], problems: _Problems) -> None:
    value = row.get("category")
    if is_missing(value):
        return
    label = {c.lower(): c for c in epa.CATEGORIES}.get(str(value).strip().lower())
    if label is None:
        near = nearest(str(value), epa.CATEGORIES)
        hint = f"; did you mean {near!r}?" if near else ""
        problems.append(("category", f"expected one of {', '.join(epa.CATEGORIES)}, got {value!r}{hint}"))
    elif indices and label not in {epa.category(i) for i in indices}:
        numbers = " or ".join(map(str, sorted(indices)))
        reason = f"the given category is {label}, an AQI of {numbers} is {epa.category(max(indices))}"
        problems.append(("category", reason))


def _own_text(row: Mapping[str, Any], name: str, problems: _Problems) -> str:
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        return value
    problems.append((name, f"expected a text, got {'nothing' if value is None or value == '' else repr(value)}"))
    return ""


# --- items drawn ---


def _draw_value(rng: random.Random, key: str, band: int) -> Decimal:
    pollutant = epa.POLLUTANTS[key]
    edges = pollutant.bands[band]
    if edges is None:
        raise ValueError(f"{pollutant.label} has no band {band}")
    scale = 10**pollutant.decimals
    return Decimal(rng.randint(int(edges[0] * scale), int(edges[1] * scale))).scaleb(-pollutant.decimals)


def _draw_readings(rng: random.Random, category: int, pollutants: Sequence[str], size: int) -> dict[str, Decimal]:
    """Readings of `size` pollutants whose overall category is number `category`."""
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
    """Upper end of each split's share, of 1 for all together."""
    return [sum(list(held.values())[: number + 1]) / sum(held.values()) for number in range(len(held))]


def pools_of(sizes: Mapping[str, int]) -> list[tuple[str, float]]:
    """Split → upper end of its share of the hashes.

    The splits other than train take a fifth together: several times their size, or they would use up what is simple.
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

    The categories are equally frequent as far as the pollutants allow; each further pollutant makes a question a third
    as frequent. Readings belong to one split, and occur once in it, but in "train" again in other words. ItemError if
    the pollutants do not offer enough different questions.
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
                    raise ItemError(
                        f"expected {n} different {split} items, found {len(items)} with pollutants "
                        f"{', '.join(pollutants)}: ask for fewer items, more pollutants or a larger max_pollutants"
                    )
                continue
            seen.add(mark)
            items.append(item)
        rng.shuffle(items)
        splits[split] = items
    return splits


# A whole number from 0 to 999 that is no part of a decimal, a longer number or a name such as PM10 or "8h".
_NUMBER = re.compile(r"(?<![\w.,-])([0-9]{1,3})(?![\w]|[.,]\d)")


def parse(answer: str) -> int | None:
    """The predicted index: the first whole number from 0 to 500 in the answer, or None.

    Where the answer says "AQI" (or "index") before a number, the numbers after its last mention are looked at first,
    so that a model which repeats the readings before it answers is read right.
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
    own, named, off = epa.category(predicted), named_category(answer), abs(predicted - truth)
    remarks = [f"number {off} off"] if off else []
    if own != epa.category(truth):
        remarks.append(f"{predicted} is {own}")
    elif off:
        remarks.insert(0, "category right")
    if named not in (None, own):
        remarks.append(f"its label is {named}")
    return Score(
        correct=own == epa.category(truth),
        predicted=predicted,
        exact=predicted == truth,
        abs_error=off,
        label_agrees=named == own,
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
