"""The report: one list of sections, which every renderer lays out. What was not measured has no section."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from db.queries import BASE
from evaluation.report.arms import CLUSTER_INDICES, KL, LOSS, RETENTION, ArmRow, ProbeRow
from evaluation.report.blocks import (
    TONES,
    Block,
    Cell,
    Chart,
    Dataset,
    Details,
    Panel,
    Section,
    Table,
    Text,
    arm_cell,
)
from evaluation.report.browser import samples
from evaluation.report.comparison import Comparison, Report, TaskRow
from evaluation.report.cost import SECONDS, cost, training
from evaluation.report.criteria import GAIN, KEPT, NAMES, NATS, Criterion
from evaluation.report.results import Key
from evaluation.report.robustness import robustness
from evaluation.report.serving import parity, precisions, served, speed
from evaluation.report.text import interval, listed, number, percent, seeds_text, significant
from evaluation.report.training import loss, probes, spectra
from evaluation.report.tuning import tuning
from evaluation.statistics.differences import Difference
from evaluation.statistics.intervals import LEVEL, MOST_EXACT, Interval
from evaluation.statistics.power import PowerRow

TITLE = "Which way of fine-tuning is better, and how sure is that?"
_MOST_SEEDS = 10
"""Differences listed seed by seed; of more seeds the smallest and the largest."""
_METHOD = ("Δ speed:", "Differences over several seeds:")
"""How notes begin that explain a method; all others limit what these data show."""
_SHORT = 12
"""Characters of a hash that are shown."""
_MOST_COLUMNS = 6
"""Arms beside each other in the table of criteria; more stand one below the other."""
_ROUNDS_TO_ZERO = 0.05
"""Points below which a change is written as 0.0, which says no more than no change."""


def sections(report: Report) -> tuple[Section, ...]:
    comparison = report.comparison
    shown = (
        findings(comparison), training(report), loss(report), probes(report), retention(report), benchmarks(report)
    )  # fmt: skip
    modes = {run.arm: run.serving_mode for run in report.results.runs if run.arm != BASE}
    folded = (
        criteria(comparison),
        every_number(comparison),
        power(comparison),
        tuning(report),
        spectra(report),
        robustness(report),
        alignment(comparison),
        speed(comparison.phases, comparison.rows, modes),
        parity(comparison.trained, report.results.runs, report.results.first_differences),
        served(comparison.served),
        precisions(comparison.precisions, comparison.primary.title),
        tasks(comparison),
        samples(report),
        files(report),
        provenance(report),
    )
    return (*filter(None, shown), *(replace(section, folded=True) for section in folded if section is not None))


def byline(report: Report) -> str:
    comparison, runs = report.comparison, report.results.runs
    seeds: dict[str, list[int]] = {}
    for run in runs:
        if run.arm != BASE:
            seeds.setdefault(run.arm, []).append(run.seed)
    parts = [f"{len(seeds)} arm{'' if len(seeds) == 1 else 's'}"]
    told = {arm: seeds_text(own) for arm, own in seeds.items()}
    if len({tuple(sorted(own)) for own in seeds.values()}) > 1:
        parts[0] += f": {', '.join(f'{arm} ({words})' for arm, words in told.items())}"
    elif told:
        parts[0] += f" with {next(iter(told.values()))}"
    if BASE in comparison.arms:
        parts.append("the untouched base")
    ended = max(run.ended for run in runs)
    text = " and ".join(parts) + f", evaluated until {ended:%Y-%m-%d %H:%M} UTC."
    text += f" Task: {comparison.primary.task}, judged by {comparison.primary.long}."
    if comparison.filters:
        text += f" {comparison.filters}; corrections for several arms count these alone."
    commits = sorted({run.git_commit[:10] for run in runs if run.git_commit})
    if commits:
        text += f" Commit {', '.join(commits)}."
    if any(run.git_dirty for run in runs):
        text += " Some stages ran on changed files."
    return text


# What was found


def findings(comparison: Comparison) -> Section:
    if not comparison.trained:
        nothing = Text("No arm besides the base has been scored yet, so there is nothing to compare.")
        return Section("Findings", (nothing,), brief=1)
    first, *others = headline(comparison)
    kept = _kept(comparison)
    wrong = [sentence for row in comparison.trained if (sentence := _unclaimed(row))]
    told = {f"{row.arm} seed {probe.seed}: {probe.verdict}: " for row in comparison.rows for probe in row.probes}
    notes = [note for note in comparison.notes if ": ".join([*note.split(": ")[:2], ""]) not in told]
    blocks: list[Block] = [Text(sentence, "lead") for sentence in (first, *wrong, kept) if sentence]
    causes = len({row.like for row in comparison.trained if row.like is not None})
    blocks += [Text(text, "note") for text in others[:causes]]
    blocks += [replace(panel, note="")] if (panel := _pictures(comparison)) else []
    blocks.append(arms_compared(comparison))
    blocks += [Text(text, "note") for text in (*others[causes:], *_front(comparison))]
    blocks += [Text(note, "note") for note in notes if not note.startswith(_METHOD)]
    methods = [*([panel.note] if panel else []), *(note for note in notes if note.startswith(_METHOD))]
    if methods:
        blocks.append(Details("How to read the numbers", tuple(Text(note, "note") for note in methods)))
    return Section("Findings", tuple(blocks), brief=1)


def headline(comparison: Comparison) -> list[str]:
    """Paragraphs: what holds against the baseline, where that has two causes against each `like`, then the base."""
    title, found = comparison.primary.title, []
    causes: dict[str, list[ArmRow]] = {}
    for row in comparison.trained:
        if row.like is not None:
            causes.setdefault(row.like, []).append(row)
    for against in dict.fromkeys((comparison.baseline, *causes, BASE)):
        groups: dict[tuple[str, str, bool, int, int], list[tuple[str, Difference]]] = {}
        for row in comparison.trained:
            if d := row.against(against):
                key = (d.outcome, d.on_these_items, d.points.crosses_zero, d.items, d.seeds)
                groups.setdefault(key, []).append((row.arm, d))
        order = ["better", "worse", "undecided"]
        ordered = sorted(groups.items(), key=lambda item: order.index(item[0][0]))
        mixed = [_two_causes(comparison, causes[against])] if against in causes else []
        found.append(" ".join((*mixed, *(_sentence(group, against, title) for _, group in ordered))))
    found.append(" ".join(_not_compared(comparison)))
    return [paragraph for paragraph in found if paragraph]


def _kept(comparison: Comparison) -> str:
    shares = [(row.arm, row.retention_share_interval) for row in comparison.trained if row.retention_share_interval]
    if not shares:
        return ""
    told = listed(
        f"{number(share.estimate)} [{number(share.low)}, {number(share.high)}] ({arm})" for arm, share in shares
    )
    return f"Kept of the base's accuracy on general tasks (retention), percent: {told}."


def _two_causes(comparison: Comparison, rows: Sequence[ArmRow]) -> str:
    """What is mixed where these arms, which have one `like`, are held against the baseline, and where it is not."""
    ways: dict[str, list[str]] = {}
    for row in rows:
        ways.setdefault(row.preserve, []).append(row.arm)
    names = listed(f"{listed(arms)} ({way})" for way, arms in ways.items())
    verb, baseline = "is" if len(rows) == 1 else "are", comparison.baseline
    told = f"{names} {verb} held to the base, {baseline} is not, so a difference from {baseline} has two causes."
    like = next((row for row in comparison.rows if row.arm == rows[0].like), None)
    if like is None:
        return f"{told} No arm here is {baseline} with the same preserve method."
    return f"{told} Like with like is the comparison with {like.arm} ({like.preserve})."


def _front(comparison: Comparison) -> Iterable[str]:
    if front := [arm for arm, above in comparison.pareto.items() if not above]:
        names = f"{listed(front)} {'is' if len(front) == 1 else 'are'}"
        yield f"Judged by the means, {names} on the Pareto front of {comparison.primary.title} and retention."


def _sentence(group: Sequence[tuple[str, Difference]], against: str, title: str) -> str:
    first = group[0][1]
    names, one = listed(arm for arm, _ in group), len(group) == 1
    seeds = f"{first.seeds} seeds" if first.seeds > 1 else "1 seed, another may differ"
    data = f"({first.items:,} items, {seeds})"
    numbers = listed(interval(d.points, sign=True) for _, d in group)
    if where := first.on_these_items:
        start = f"{names} {'is' if one else 'are'} {where} {against} on these items: {numbers} points"
        return (
            f"{start} with {'a 95% interval' if one else '95% intervals'} ({first.items:,} items); one seed: undecided."
        )
    if first.outcome == "undecided":
        if first.points.crosses_zero:
            start = f"Whether {names} {'is' if one else 'are'} better or worse than {against} is undecided:"
        else:
            p_values = listed(f"{d.p_holm:.2g}" for _, d in group)
            verb = "differs" if one else "differ"
            start = f"That {names} {verb} from {against} is not shown, since it may be chance (p = {p_values}):"
        return f"{start} {numbers} points with {'a 95% interval' if one else '95% intervals'} {data}."
    if one:
        word = "beats" if first.outcome == "better" else "is worse than"
        low, high = map(number, sorted((abs(first.points.low), abs(first.points.high))))
        by = number(abs(first.points.estimate))
        return f"{names} {word} {against} by {by} points of {title}, 95% interval {low} to {high} {data}."
    word = "beat" if first.outcome == "better" else "are worse than"
    return f"{names} {word} {against}: {numbers} points of {title} with 95% intervals {data}."


def _not_compared(comparison: Comparison) -> Iterable[str]:
    for against in reversed(comparison.references):
        alone = [row.arm for row in comparison.trained if row.arm != against and row.against(against) is None]
        if alone:
            why = f"no run of {against} has the same {'' if against == BASE else 'seed, '}items and backend"
            if against not in comparison.arms:
                why = f"there is no run of {against} here"
            yield f"{listed(alone)} {'is' if len(alone) == 1 else 'are'} not compared with {against}: {why}."


def _wrong(row: ArmRow) -> dict[str, list[ProbeRow]]:
    """Verdict → the probes that speak against the arm's claim."""
    found: dict[str, list[ProbeRow]] = {}
    for probe in row.probes:
        if probe.as_claimed is False:
            found.setdefault(probe.verdict, []).append(probe)
    return found


def _unclaimed(row: ArmRow) -> str:
    wrong = _wrong(row)
    seeds = seeds_text(probe.seed for probes in wrong.values() for probe in probes)
    reasons = "; ".join(probes[0].reason.rstrip(".") for probes in wrong.values())
    return (
        f"{row.arm} did not train as it claims: the probe found {listed(wrong)} ({seeds}): {reasons}." if wrong else ""
    )


def criteria(comparison: Comparison) -> Section | None:
    if not comparison.criteria:
        return None
    judged = {(c.name, c.threshold, c.arm): c for c in comparison.criteria}
    arms = [row.arm for row in comparison.trained]

    def named(name: str) -> str:  # not every task's primary metric is an accuracy
        return name if comparison.primary.air or name != GAIN else "gain"

    found = dict.fromkeys((c.name, c.threshold, c.unit) for c in comparison.criteria)
    asked = [
        (name, threshold, threshold + (f", {unit}" if unit != "percent" else ""))
        for name, threshold, unit in sorted(found, key=lambda one: NAMES.index(one[0]))
    ]
    headers, page_only = ["Criterion", *arms], list[str]()
    rows: list[tuple[Cell, ...]] = [
        (Cell(named(name), hint=hint), *(_outcome(judged.get((name, threshold, arm))) for arm in arms))
        for name, threshold, hint in asked
    ]
    if len(arms) > _MOST_COLUMNS:
        headers = ["Arm", *(f"{named(name)}: {hint}" for name, _, hint in asked)]
        page_only = [headers[at] for at in range(2, len(headers)) if asked[at - 1][0] == asked[at - 2][0]]
        rows = [(arm_cell(arm), *(row[at] for row in rows)) for at, arm in enumerate(arms, start=1)]
    reasons = [
        (named(c.name), arm_cell(c.arm), Cell(c.outcome, tone=TONES[c.outcome]), c.why) for c in comparison.criteria
    ]
    why = "Why each criterion was judged so"
    blocks = (
        Text(
            "Three outcomes were named before the run: accuracy above the baseline's, evaluation loss below the "
            "baseline's and retention. The loss is compared seed by seed, with Student's t over seeds and without "
            "correction for several arms: one seed decides nothing.", "note"
        ),
        Table("Success criteria: pass or fail only where the whole 95% interval is on one side",
              headers, rows, page_only),
        Details(why, (Table(why, ("Criterion", "Arm", "Outcome", "Why"), reasons),)),
    )  # fmt: skip
    return Section("Success criteria", blocks, brief=2)


def _outcome(criterion: Criterion | None) -> Cell:
    if criterion is None:
        return Cell("–")
    estimate = criterion.estimate
    if estimate is None:
        hint = "not comparable" if criterion.unit == "points" else "not measured"
    else:  # a share of what the base knows is no change, so it has no sign
        hint = interval(estimate, sign=criterion.name != KEPT, digits=4 if criterion.unit == NATS else 1)
        if criterion.confidence < 100 * LEVEL:
            hint += f"\n{_confidence(criterion.confidence)}"
    return Cell(criterion.outcome, tone=TONES[criterion.outcome], hint=hint)


def _confidence(confidence: float) -> str:
    return f"{confidence:.0f}% interval" if confidence > 0 else "a single value"


# The numbers behind it

_ANSWERS = ("test_answers", "answer_perplexity")


def arms_compared(comparison: Comparison) -> Table:
    title, references = comparison.primary.title, comparison.references
    perplexity = ("Perplexity of right answers",) * _free_text(comparison)
    headers = ("Arm", f"{title}, %", *perplexity, *(f"Δ to {arm}, points" for arm in references), "Retention, %",
               "Training", "Updates")  # fmt: skip
    return Table(
        "Arms compared with the untouched base: means over seeds, in brackets 95% intervals; "
        f"×: times {comparison.baseline}'s",
        headers,
        [_line(row, comparison) for row in comparison.rows],
        page_only=[f"Δ to {BASE}, points"] if len(references) > 1 else (),
    )


def _free_text(comparison: Comparison) -> bool:
    """Whether ROUGE judges the answers, whose words may be others and as good: then perplexity stands beside it."""
    return comparison.primary.metric.endswith("_rouge_l") and comparison.has(*_ANSWERS)


def _line(row: ArmRow, comparison: Comparison) -> tuple[object, ...]:
    wrong = any(probe.as_claimed is False for probe in row.probes)
    seeds = f"{len(row.seeds)} seed{'s' if len(row.seeds) > 1 else ''}"
    share = row.retention_share_interval
    return (
        Cell(row.arm, arm=row.arm, hint="\n".join(filter(None, (seeds, _preserved(row))))),
        _score(row.accuracy, row.accuracy_interval),
        *((significant(row.metrics.get(_ANSWERS)),) if _free_text(comparison) else ()),
        *(_against(row.against(arm)) for arm in comparison.references),
        Cell(_score(row.retention, row.retention_interval), hint=f"keeps {number(share.estimate)} %" if share else ""),
        cost(row, comparison, SECONDS),
        Cell(row.updates or "–", tone="bad" if wrong else "", hint="not as claimed" if wrong else ""),
    )


def _preserved(row: ArmRow) -> str:
    return f"preserved: {row.preserve}" if row.preserve else ""


def _score(value: float | None, bounds: Interval | None) -> str:
    return number(value) if bounds is None else interval(bounds)


def _against(found: Difference | None) -> Cell:
    if found is None:
        return Cell("–")
    tone = TONES[found.outcome] if found.outcome != "undecided" else ""
    outcome = f"{'one seed: ' if found.on_these_items else ''}{found.outcome}"
    return Cell(interval(found.points, sign=True), tone=tone, hint=f"{outcome}\np = {found.p_holm:.2g}")


def _pictures(comparison: Comparison) -> Panel | None:
    data = Dataset(("kind", "against", "label", "arm", "seed", "low", "value", "high"))
    levels = set()
    for row in comparison.rows:
        for d in row.differences:
            levels.add(d.level)
            start = (d.against, row.arm, row.arm)
            data.add("interval", *start, "", d.points.low, d.points.estimate, d.points.high)
            if d.level == "seeds and items":
                data.add("inner", *start, "", d.items_only.low, d.items_only.estimate, d.items_only.high)
            for seed, point in zip(d.seed_numbers, d.by_seed, strict=True) if len(d.by_seed) > 1 else ():
                data.add("seed", *start, str(seed), None, point, None)
    if not data.rows:
        return None
    title, arms = comparison.primary.title, tuple(row.arm for row in comparison.trained)
    kinds = set(data.levels("kind"))
    drawn = tuple(
        Chart(
            id=f"difference-{at}",
            title=f"{title} minus that of {against}, points",
            label=f"Difference of {title} from {against} in percentage points with 95% intervals, one line an arm",
            draw="intervals",
            options={"title": "points", "zero": True, "kinds": kinds,
                     "lines": len({row[3] for row in data.rows if row[1] == against})},
            where={"against": against},
        )
        for at, against in enumerate(sorted(data.levels("against"), key=lambda arm: arm != comparison.baseline))
    )  # fmt: skip
    notes = []
    if "seeds and items" in levels:
        notes.append("The thin bars hold for other seeds and other items, the broad pale ones for other items only.")
    if "items" in levels:
        notes.append("With one seed an interval holds for other items only, and tells no arm from another one.")
    if "seed" in kinds:
        notes.append("Ticks are single seeds.")
    notes.append("An interval that contains zero decides nothing.")
    return Panel("differences", data, drawn, arms, note=" ".join(notes), legend=False)


def every_number(comparison: Comparison) -> Section | None:
    blocks = (*_differences(comparison), *_every_metric(comparison))
    return Section("Every number", blocks) if blocks else None


def _differences(comparison: Comparison) -> list[Block]:
    found = [(row.arm, d) for row in comparison.rows for d in row.differences]
    if not found:
        return []
    binary = all(d.binary for _, d in found)
    test = "McNemar's exact test"
    if not binary:
        test = (
            f"a paired randomization test of the mean (signs flipped in every way up to {MOST_EXACT} items that "
            "differ, 10,000 times at random with more; McNemar's exact test where all answers are right or wrong)"
        )
    heads = (
        "Arm", "Against", "Points [95%]", "Over items alone", "Over seeds alone", "Level", "Items", "Seeds",
        "Seed by seed", _gained_and_lost(binary), "p", "p (Holm)", "Outcome",
    )  # fmt: skip
    rows = [
        (arm_cell(arm), d.against, interval(d.points, sign=True, digits=2), interval(d.items_only, sign=True, digits=2),
         interval(d.seeds_only, sign=True, digits=2), d.level, str(d.items), str(d.seeds), _seed_range(d),
         f"{d.gained}, {d.lost}", f"{d.p_value:.2g}", f"{d.p_holm:.2g}", Cell(d.outcome, tone=TONES[d.outcome]))
        for arm, d in found
    ]  # fmt: skip
    words = (
        "The outcome rests on the interval [95%]: over seeds and items where there are several seeds, else over items. "
        "An interval over items alone treats these seeds as the only ones, one over seeds alone, a check by plain "
        f"Student's t, these items. p: {test} with one seed, Student's t over seeds and items with several; Holm: "
        "corrected for several arms."
    )
    title = f"Paired differences of {comparison.primary.long}"
    return [Table(title, heads, rows), Text(words, "note")]


def _gained_and_lost(binary: bool) -> str:
    return "Gained, lost" if binary else "Items better, worse"


def _seed_range(difference: Difference) -> str:
    by_seed = sorted(zip(difference.by_seed, difference.seed_numbers, strict=True))
    points = [f"{number(value, sign=True)} (seed {seed})" for value, seed in by_seed]
    return f"{points[0]} to {points[-1]}" if len(points) > _MOST_SEEDS else ", ".join(points)


def _every_metric(comparison: Comparison) -> list[Block]:
    """Every final number of every arm; the parity of exports has a table of its own."""
    lines = []
    for key in dict.fromkeys(key for row in comparison.rows for key in row.metrics if key[0] != "parity"):
        unit, direction, meaning = comparison.units.get(key[1], ("–", "–", ""))
        start = (Cell(key[1], title=meaning), key[0], unit, direction)
        lines.append((*start, *(_with_spread(row, key) for row in comparison.rows)))
    table = Table(
        "Every metric in its own unit: mean over seeds, in brackets the smallest and the largest of them",
        ("Metric", "Split", "Unit", "Better", *comparison.arms),
        lines,
    )
    return [table] if lines else []


def _with_spread(row: ArmRow, key: Key) -> str:
    """An arm's mean of a metric, and its range over the seeds where the written numbers differ."""
    value = row.metrics.get(key)
    ends = [significant(end) for end in row.ranges.get(key, ())]
    known = value is not None and math.isfinite(value)  # of seeds that are not all finite there is no range
    return f"{significant(value)} ({ends[0]} to {ends[1]})" if known and len({*ends}) > 1 else significant(value)


def power(comparison: Comparison) -> Section | None:
    found = {(row.arm, row.against, row.points): row for row in comparison.power}
    if not found:
        return None
    sizes = sorted({points for _, _, points in found})
    rows = []
    for arm, against in dict.fromkeys((arm, against) for arm, against, _ in found):
        known = [found[arm, against, points] for points in sizes]
        rows.append((arm_cell(arm), against, f"{known[0].items_now:,}", str(known[0].seeds_now), *map(_needed, known)))
    plural = [f"{points} point{'s' if points > 1 else ''}" for points in sizes]
    headers = ("Arm", "Against", "Items now", "Seeds now", *(f"Items for {size}" for size in plural))
    reasons = [(arm_cell(row.arm), row.against, str(row.points), row.why) for row in found.values()]
    why = "What these numbers rest on"
    return Section(
        "How many items it would take",
        (
            Text(
                "Test items that would show a true difference of that size with 80% power at α = 0.05, two-sided and "
                "without the correction for several arms, with as many seeds as now. The numbers rest on the variation "
                "seen here; with two or three seeds read them as orders of magnitude. With one seed they are about "
                "being ahead on such items: to call an arm better by so little takes more seeds."
            ),
            Table("Test items needed to see a difference", headers, rows),
            Details(why, (Table(why, ("Arm", "Against", "Points", "Why"), reasons),)),
        ),
        brief=3,
    )


def _needed(row: PowerRow) -> Cell:
    if row.items is not None:
        return Cell(f"{row.items:,}")
    return Cell("no number", hint=f"{row.seeds} seeds would" if row.seeds else "needs more seeds")


# What the arms kept and what they changed

Axis = tuple[Key, str, float]
"""(split, name), title with unit, factor."""
_KEPT: Axis = (RETENTION, "retention accuracy, %", 100)
_KL: Axis = (KL, "KL(base ‖ tuned), nats a token", 1)
_DRIFT: Axis = (("hidden", "drift_relative"), "drift of hidden states, ‖h − h₀‖ / ‖h₀‖", 1)
_NORM: Axis = (("weights", "update_norm"), "‖ΔW‖, Frobenius", 1)
_UPDATES: Mapping[Key, str] = {
    ("general", "perplexity"): "Perplexity",
    ("general", "loss"): "Loss there, nats per token",
    ("weights", "update_norm"): "‖ΔW‖",
    ("weights", "update_norm_relative"): "‖ΔW‖ / ‖W‖",
    ("weights", "effective_rank"): "Effective rank",
    ("weights", "stable_rank"): "Stable rank",
    ("weights", "rank"): "Rank",
    ("hidden", "drift_relative"): "Drift",
    ("hidden", "drift_cosine"): "1 − cosine",
}


def retention(report: Report) -> Section | None:
    comparison = report.comparison
    more = tuple(block for block in (_forgetting(report), _retained(comparison), _updates(comparison)) if block)
    front = _front_table(comparison)
    if not front and not more:
        return None
    lead = (
        "Retention is the accuracy on general tasks that no arm was trained on." if comparison.has(*RETENTION) else ""
    )
    if comparison.has("general", "perplexity"):
        lead += (
            " Perplexity is of the texts that measure.text names: of the answers of the retention questions unless it "
            "names others; the base's was measured with the adapter off."
        )
    blocks: list[Block] = [Text(lead.strip())] if lead else []
    blocks += [front] if front else []
    blocks += [Details("Task by task, and what changed in the model", more)] if front and more else more
    return Section("Retention", tuple(blocks))


def _front_table(comparison: Comparison) -> Table | None:
    above = comparison.pareto
    if not above:
        return None
    told = {arm: f"dominated by {listed(names)}" if names else "on the front" for arm, names in above.items()}
    rows = sorted(comparison.rows, key=lambda row: (row.arm != BASE, bool(above.get(row.arm)), -(row.accuracy or 0)))
    lines = [
        (
            Cell(row.arm, arm=row.arm, hint=_preserved(row)),
            _score(row.accuracy, row.accuracy_interval),
            _score(row.retention, row.retention_interval),
            "100.0" if row.arm == BASE else interval(row.retention_share_interval),
            *(significant(row.metrics.get(key)) for key in (LOSS, KL)),
            told.get(row.arm, "–"),
        )
        for row in rows
    ]
    headers = ("Arm", f"{comparison.primary.title}, %", "Retention, %", "Kept of the base's, %",
               "Evaluation loss", "KL to the base", "Pareto front")  # fmt: skip
    caption = (
        "What was learnt and what was kept: means over seeds, in brackets 95% intervals; loss and KL in nats per token"
    )
    return Table(caption, headers, lines)


def _forgetting(report: Report) -> Panel | None:
    """How far an arm has gone from the base, by the first measure that there is, and what it kept."""
    comparison, results = report.comparison, report.results
    across = next((axis for axis in (_KL, _DRIFT, _NORM) if comparison.has(*axis[0])), _NORM)
    data = Dataset(("arm", "seed", "x", "y"))
    for run in results.runs:
        known = results.metrics.get(run.id, {})
        x, y = (known.get(axis[0], math.nan) * axis[2] for axis in (across, _KEPT))
        if run.arm != BASE and math.isfinite(x) and math.isfinite(y) and (across is not _KL or x > 0):
            data.add(run.arm, str(run.seed), x, y)
    if not data.rows:
        return None
    title = "How far from the base, and what was kept"
    label = f"{title}: one point for each arm and seed; across {across[1]}, up {_KEPT[1]}"
    drawn = Chart("forgetting", title, label, "scatter",
                  {"x_title": across[1], "y_title": _KEPT[1], "log_x": across is _KL})  # fmt: skip
    note = "One point for each arm and seed; its shape says the same as its colour."
    arms = tuple(row.arm for row in comparison.trained)
    if absent := [arm for arm in arms if arm not in data.levels("arm")]:
        note += f" Not drawn, since not measured or not finite: {', '.join(absent)}."
    return Panel("forgetting", data, (drawn,), arms, note=note)


def _retained(comparison: Comparison) -> Table | None:
    rows = comparison.rows
    if not comparison.has(*RETENTION):
        return None
    others = (key for row in rows for key in row.metrics if key[0] == "retention" and key != RETENTION)
    lines = []
    for key in dict.fromkeys((RETENTION, *others)):
        base = next((row.metrics.get(key) for row in rows if row.arm == BASE), None)
        cells = ["all tasks" if key == RETENTION else key[1].removeprefix("retention/")]
        for row in rows:
            value = row.metrics.get(key)
            change = None if row.arm == BASE or value is None or base is None else 100 * (value - base)
            told = "" if change is None or abs(change) < _ROUNDS_TO_ZERO else f" ({number(change, sign=True)})"
            cells.append(percent(value) + told)
        lines.append(cells)
    shares = ("100.0" if row.arm == BASE else interval(row.retention_share_interval) for row in rows)
    lines.append(["kept of the base's, same items [95%]", *shares])
    caption = "Accuracy on the retention tasks, percent, mean over seeds (change from the base, points)"
    return Table(caption, ("Task", *comparison.arms), lines)


def _updates(comparison: Comparison) -> Table | None:
    columns = {key: title for key, title in _UPDATES.items() if comparison.has(*key)}
    if not columns:
        return None
    rows = tuple(
        (arm_cell(row.arm), *(significant(row.metrics.get(key)) for key in columns)) for row in comparison.rows
    )
    caption = (
        "Size of the updates, mean over seeds: Frobenius norms, ranks as means over modules, drift of hidden states"
    )
    return Table(caption, ("Arm", *columns.values()), rows)


def alignment(comparison: Comparison) -> Section | None:
    found = [(row, measured) for row in comparison.rows for measured in row.alignment]
    if not found:
        return None
    data = Dataset(("kind", "label", "arm", "seed", "low", "value", "high"))
    for row, measured in found:
        label = row.arm if len(row.seeds) == 1 else f"{row.arm} · {measured.seed}"
        for kind, value in (("band", measured.null), ("interval", measured.index)):
            if value and math.isfinite(measured.index.estimate):
                data.add(kind, label, row.arm, str(measured.seed), value.low, value.estimate, value.high)
    missing = [arm for arm in comparison.arms if arm not in data.levels("arm")]
    panel = Panel(
        "alignment",
        data,
        (
            Chart(
                "alignment",
                "Alignment Quality Index with 95% interval; grey: what shuffled labels give",
                "Alignment Quality Index of each arm and seed with its interval and the range under shuffled labels",
                "intervals",
                {"title": "index", "lines": len(data.levels("label")), "kinds": ("band", "interval"),
                 "band": "95% under shuffled labels"},
            ),
        ),
        comparison.arms,
        note=f"Not drawn, since not measured or not finite: {', '.join(missing)}." if missing else "",
        wide=True,
    )  # fmt: skip
    others = [name for name in CLUSTER_INDICES if any(name in measured.others for _, measured in found)]
    table = Table(
        "Alignment Quality Index by run; intervals by bootstrap over prompts",
        ("Arm", "Seed", "Index [95%]", "Shuffled labels [95%]", "p", "Δ to base [95%]", "p of Δ",
         *(name.replace("_", " ") for name in others)),
        [(arm_cell(row.arm), str(m.seed), interval(m.index, digits=3), interval(m.null, digits=3),
          significant(m.p_value, 2), interval(m.delta, sign=True, digits=3), significant(m.delta_p_value, 2),
          *(significant(m.others.get(name), 3) for name in others)) for row, m in found],
    )  # fmt: skip
    words = (
        "How far apart safe and unsafe prompts lie in the model's hidden states (arXiv 2506.13901), with the scale "
        "fixed on the base; higher is further apart. A model tells them apart where the index exceeds what shuffled "
        "labels give: p is the share of shuffles that separate as well. Δ is the index above its own mean under "
        "shuffled labels, arm minus base, so it is not the difference of two indices of the table. Whether Δ is more "
        "than chance rests on its own p (shuffled labels in both models, and bootstrap: the larger one; over several "
        "seeds twice their mean), not corrected for several arms."
    )
    if comparison.primary.air:
        words += " It has nothing to do with the Air Quality Index, which the arms learn to predict."
    lines = tuple(Text(line) for line in comparison.alignment)
    return Section("Alignment Quality Index", (Text(words), *lines, panel, table))


_TRAINED = ("adapter", "base_model", "dataset")
"""Kinds of files that no export makes."""


def files(report: Report) -> Section | None:
    made = [(run, file) for run in report.results.runs for file in report.results.artifacts.get(run.id, ())]
    rows = [
        (arm_cell(run.arm, run.seed), file.kind, f"{file.bytes:,}", Cell(file.sha256[:_SHORT], title=file.sha256),
         Cell((file.parent_sha256 or "–")[:_SHORT], title=file.parent_sha256 or ""), file.path)
        for run, file in made
    ]  # fmt: skip
    if not rows:
        return None
    headers = ("Run", "Kind", "Bytes", "sha256", "Made from", "File")
    table = Table("Files with their hashes; made from: the hash of the file it was made of", headers, rows)
    kind = "exported files" if any(file.kind not in _TRAINED for _, file in made) else "files"
    return Section("Files", (Text(f"All {len(rows)} {kind}."), table))


# Other tasks, and where it all comes from


def tasks(comparison: Comparison) -> Section | None:
    """Every task and arm in the database; none where there is one task only."""
    if len({row.task for row in comparison.tasks}) < 2:
        return None
    notes = (Text(note, "note") for note in comparison.task_notes)
    return Section("All data sets in this database", (*all_tasks(comparison), *notes))


def all_tasks(comparison: Comparison) -> tuple[Text, Table]:
    headers = ("Task", "Arm", "Score, % [95%]", *(f"Δ to {arm}, points [95%]" for arm in comparison.references),
               "Outcome", "Evaluated")  # fmt: skip
    rows = [_task_line(row, comparison.references) for row in comparison.tasks]
    words = (
        "Every task that has finished runs, also those whose results are no longer on the disk: the latest run of each "
        "arm and seed, with the base model and settings of the newest. Intervals and outcomes are as in the table of "
        "one task; do not compare scores of different tasks. One seed tells no arm from another one."
    )
    caption = "Every task and arm: means over seeds of the task's primary metric"
    table = Table(caption, headers, rows, page_only=headers[-1:])
    return Text(words), table


def _task_line(row: TaskRow, references: Sequence[str]) -> tuple[object, ...]:
    deltas = [row.to_base, row.to_baseline][: len(references)]
    return (
        Cell(row.task, hint=row.title + ("\n(on disk)" if row.current else "")),
        Cell(row.arm, arm=row.arm, hint=seeds_text(row.seeds)),
        _score(row.score, row.interval),
        *(Cell("–") if d is None else replace(_against(d), hint="") for d in deltas),
        row.outcome or "–",
        Cell(f"{row.ended:%Y-%m-%d}", hint=f"{row.ended:%H:%M} UTC"),
    )


def benchmarks(report: Report) -> Section | None:
    comparison, asked = report.comparison, report.results.benchmarks
    if not asked:
        return None
    headers = ("Benchmark", "Arm", "Score, % [95%]", *(f"Δ to {arm}, points [95%]" for arm in comparison.references),
               "Outcome")  # fmt: skip
    items = {name: len(set().union(*found.answers.values())) for name, found in asked.items()}
    rows = [
        (Cell(row.task, hint=f"{row.metric}\n{items[row.task]:,} items"), *_task_line(row, comparison.references)[1:-1])
        for row in comparison.benchmarks
    ]
    words = (
        "Benchmarks of lm-evaluation-harness, asked as it does by default: no prompt template of ours, the task's own "
        "few-shot examples. A score is the mean over items of a task's first metric that is a share; the items of a "
        "group are those of all its tasks. Differences are taken item by item; intervals and Holm's correction over "
        "the arms are as for the test items, and nothing corrects for several benchmarks. lm-eval's own figures are in "
        "Every number."
    )
    caption = "Standard benchmarks: means over seeds, in brackets 95% intervals"
    table = Table(caption, headers, rows, page_only=headers[-1:])
    blocks: list[Block] = [Text(words), *([table] if rows else [])]
    if plain := [name for name, found in asked.items() if not found.answers]:
        told = f"No metric of {listed(plain)} is a share of each item: see Every number, where nothing is judged."
        blocks.append(Text(told, "note"))
    return Section("Standard benchmarks", tuple(blocks), brief=6)


def provenance(report: Report) -> Section:
    dirty = {True: Cell("yes", tone="bad"), False: "no", None: "unknown"}
    packages: dict[str, dict[str, list[int]]] = {}
    rows = []
    for run in report.comparison.runs:
        commit = run["git_commit"] or "unknown"
        rows.append(
            (arm_cell(run["arm"], run["seed"]), Cell(run["run_key"][:_SHORT], title=run["run_key"]),
             Cell(commit[:_SHORT], title=commit), dirty[run["git_dirty"]],
             Cell(run["backend"], hint="" if run["arm"] == BASE else run["serving_mode"]), run["device"],
             run["ended"][:16].replace("T", " ") + " UTC")
        )  # fmt: skip
        text = ", ".join(f"{name} {version}" for name, version in run["packages"].items())
        system = f"Python {run['python'] or 'unknown'} on {run['platform'] or 'unknown'}: {text}"
        packages.setdefault(system, {}).setdefault(run["arm"], []).append(run["seed"])
    headers = ("Run", "Run key", "Commit", "Dirty", "Backend", "Device", "Evaluated")
    listed_packages = tuple(
        Text(f"{', '.join(f'{arm} {seeds_text(seeds)}' for arm, seeds in who.items())}: {text}", "note")
        for text, who in packages.items()
    )
    items = sorted({run["test_items_sha256"] for run in report.comparison.runs})
    kinds = "" if len(items) == 1 else f"{len(items)} different sets, "
    return Section(
        "Where the numbers come from",
        (
            Table("Runs; the run key is a hash of settings, inputs and backend", headers, rows),
            Text(f"Test items: {kinds}sha256 {', '.join(items)}.", "note"),
            Details("Packages", listed_packages),
        ),
    )  # fmt: skip
