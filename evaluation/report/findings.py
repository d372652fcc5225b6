"""The first screen: the story in words, the arms side by side, and limits of the interpretation."""

from collections.abc import Iterable
from dataclasses import replace

from db.runs import BASE
from evaluation.report.arms import ArmRow
from evaluation.report.blocks import TONES, Block, Cell, Chart, Dataset, Details, Panel, Section, Table, Text
from evaluation.report.comparison import Comparison
from evaluation.report.cost import SECONDS, cost, learned_and_kept
from evaluation.report.judgement import compared, contradiction, like_with_like, not_compared
from evaluation.report.text import arms_in_words, counted, interval, listed, number, score, significant
from evaluation.statistics.differences import Difference

ANSWERS = ("test_answers", "answer_perplexity")
_POINTS = 3
"""Difference for which the story says how many items it would take."""


def story(comparison: Comparison) -> list[str]:
    """What was gained, what was kept, at what cost, and how sure that is: a paragraph for each."""
    if not comparison.trained:
        return ["Only the base has been scored so far, so there is nothing to compare."]
    rows, title, baseline = comparison.trained, comparison.primary.title, comparison.baseline
    paragraphs = [
        *headline(comparison),
        compared(rows, BASE, title) if baseline != BASE else "",
        _kept(comparison),
        _training_time(comparison),
        certainty(comparison),
    ]
    return [paragraph for paragraph in paragraphs if paragraph]


def headline(comparison: Comparison) -> list[str]:
    """What holds against the baseline, and against the arm that differs from each in one thing alone."""
    rows, title, baseline = comparison.trained, comparison.primary.title, comparison.baseline
    arms = {row.arm: row for row in comparison.rows}
    # An arm that did not train as it claims casts doubt on everything below.
    lines = [compared(rows, baseline, title), *map(contradiction, rows), *like_with_like(rows, arms, baseline, title)]
    return [line for line in lines if line]


def next_step(comparison: Comparison) -> str:
    """What to do after reading the result."""
    differences = [d for row in comparison.trained for d in row.differences if d.against != BASE]
    if any(contradiction(row) for row in comparison.trained):
        return "Next: mend the arm that did not train as it claims; the probe's reason is above."
    if any(d.seeds == 1 for d in differences):
        return "Next: list more seeds in matrix.seeds of params.yaml and run again; only new runs are trained."
    if any(d.outcome == "undecided" for d in differences):
        return "Next: more seeds (matrix.seeds) or test items (prepare_data.test_items) make the intervals narrower."
    return "Next: `make serve` puts the models onto an Ollama server."


def scoreboard(comparison: Comparison) -> Table:
    """One line per arm: what was learned, what was kept, at what cost, and how sure that is."""
    baseline, primary = comparison.baseline, comparison.primary
    headers = ("Arm", f"{primary.short}, %", f"Δ to {baseline}", "Kept, %", "Training", "Better?")
    rows = [
        (
            Cell(row.arm, arm=row.arm),
            score(row.accuracy, row.accuracy_interval),
            "–" if (difference := row.against(baseline)) is None else interval(difference.points, sign=True),
            number(None if row.retention_kept is None else row.retention_kept.estimate),
            cost(row, comparison, SECONDS).text,
            replace(against_cell(difference, hint=False), text=_sure(difference)),
        )
        for row in comparison.rows
    ]
    return Table(f"Means over seeds with 95% intervals; differences in points of {primary.title}", headers, rows)


def _sure(difference: Difference | None) -> str:
    if difference is None:
        return "–"
    return "one seed" if difference.on_these_items else difference.outcome


def _kept(comparison: Comparison) -> str:
    shares = {row.arm: row.retention_kept for row in comparison.trained if row.retention_kept}
    if not shares:
        return ""
    who = f" by {next(iter(shares))}" if len(shares) == 1 else ""
    return f"Kept of the base's accuracy on general tasks{who}: {arms_in_words(shares, unit='%')}."


def _training_time(comparison: Comparison) -> str:
    times = []
    for row in comparison.trained:
        cell = cost(row, comparison, SECONDS)
        if SECONDS in row.costs:
            times.append(f"{cell.text} for {row.arm}" + f" ({cell.hint})" * bool(cell.hint))
    return f"Training took {listed(times)}." if times else ""


def certainty(comparison: Comparison) -> str:
    if not any(row.differences for row in comparison.trained):
        return ""
    alone = [row.arm for row in comparison.trained if any(d.seeds == 1 for d in row.differences)]
    words = "The intervals allow for other seeds and other test items."
    if alone:
        who = "Every arm has" if len(alone) == len(comparison.trained) > 1 else f"{listed(alone)} ran with"
        words = f"{who} one seed, which cannot show that one arm is better than another."
    power = [row for row in comparison.power if row.against == comparison.baseline and row.points == _POINTS]
    if power and all(row.items for row in power):
        most = max(row.items or 0 for row in power)
        words += f" Detecting a true difference of {_POINTS} points from {comparison.baseline} reliably would take "
        words += f"about {most:,} test items; there are {power[0].items_now:,}."
    elif power:
        words += f" With so few seeds, no number of test items would reliably detect a difference of {_POINTS} points."
    return words


def findings(comparison: Comparison) -> Section:
    paragraphs = story(comparison)
    blocks: list[Block] = [Text(paragraph, "lead") for paragraph in paragraphs]
    if not comparison.trained:
        return Section("Findings", tuple(blocks), brief=1)
    if picture := learned_and_kept(comparison):  # near the top: it tells the story at a glance
        blocks.insert(1, picture)
    if panel := _differences(comparison):
        blocks.append(panel)
    blocks.append(arms_compared(comparison))
    missing = not_compared(comparison.trained, comparison.references, comparison.arms)
    notes = (*missing, *_front(comparison), *comparison.notes)
    blocks += [Text(note, "note") for note in notes if note not in paragraphs]
    if comparison.methods:
        blocks.append(Details("How to read the numbers", tuple(Text(note, "note") for note in comparison.methods)))
    return Section("Findings", tuple(blocks), brief=1)


def _front(comparison: Comparison) -> Iterable[str]:
    if front := [arm for arm, above in comparison.pareto.items() if not above]:
        names, title = f"{listed(front)} {'is' if len(front) == 1 else 'are'}", comparison.primary.title
        yield f"Judged by their means, {names} on the Pareto front of {title} and retention."


# The arms side by side


def arms_compared(comparison: Comparison) -> Table:
    references = comparison.references
    # ROUGE penalizes an answer for saying the same in other words; perplexity does not.
    free_text = comparison.primary.metric.endswith("_rouge_l") and comparison.has(*ANSWERS)
    headers = ("Arm", f"{comparison.primary.title}, %", *("Perplexity of right answers",) * free_text,
               *(f"Δ to {arm}, points" for arm in references), "Retention, %", "Training", "Updates")  # fmt: skip
    lines = [
        (
            Cell(row.arm, arm=row.arm, hint="\n".join(filter(None, (counted(len(row.seeds), "seed"), preserved(row))))),
            score(row.accuracy, row.accuracy_interval),
            *(significant(row.metrics.get(ANSWERS)),) * free_text,
            *(against_cell(row.against(arm)) for arm in references),
            Cell(score(row.retention, row.retention_interval),
                 hint="" if row.retention_kept is None else f"keeps {number(row.retention_kept.estimate)}%"),
            cost(row, comparison, SECONDS),
            Cell(row.updates or "–", tone="bad" if contradiction(row) else "",
                 hint="not as claimed" if contradiction(row) else ""),
        )
        for row in comparison.rows
    ]  # fmt: skip
    caption = f"Arms compared: means over seeds with 95% intervals in brackets; × is relative to {comparison.baseline}"
    return Table(caption, headers, lines, [f"Δ to {BASE}, points"] if len(references) > 1 else ())


def preserved(row: ArmRow) -> str:
    return f"preserved: {row.preserve}" if row.preserve else ""


def against_cell(difference: Difference | None, *, hint: bool = True) -> Cell:
    if difference is None:
        return Cell("–")
    tone = TONES[difference.outcome] if difference.outcome != "undecided" else ""
    outcome = f"{'one seed: ' if difference.on_these_items else ''}{difference.outcome}"
    points = interval(difference.points, sign=True)
    return Cell(points, tone=tone, hint=f"{outcome}\np = {difference.p_holm:.2g}" if hint else "")


def _differences(comparison: Comparison) -> Panel | None:
    data = Dataset(("kind", "against", "label", "arm", "seed", "low", "value", "high"))
    for row in comparison.rows:
        for d in row.differences:
            start = (d.against, row.arm, row.arm)
            data.add("interval", *start, "", d.points.low, d.points.estimate, d.points.high)
            for seed, point in zip(d.seed_numbers, d.by_seed, strict=True) if len(d.by_seed) > 1 else ():
                data.add("seed", *start, str(seed), None, point, None)
    if not data.rows:
        return None
    title, kinds = comparison.primary.title, data.levels("kind")
    charts = tuple(
        Chart(
            id=f"difference-{at}",
            title=f"{title} minus that of {against}, points",
            draw="intervals",
            options={"x_title": "points", "kinds": kinds,
                     "lines": len({row[3] for row in data.rows if row[1] == against})},
            where={"against": against},
        )
        for at, against in enumerate(sorted(data.levels("against"), key=lambda arm: arm != comparison.baseline))
    )  # fmt: skip
    note = "Bars are 95% intervals; one that contains zero decides nothing."
    if any(d.level == "items" for row in comparison.rows for d in row.differences):
        note += " With one seed, a bar allows for other items only."
    if "seed" in kinds:
        note += " Ticks are single seeds."
    return Panel("differences", data, charts, note=note)
