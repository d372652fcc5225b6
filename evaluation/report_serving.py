"""Sections of the report about what is served: precisions, servers against training, phases of a request."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from evaluation.comparison import Comparison
from evaluation.markdown import grid, interval, number
from evaluation.serving import PhaseRow, PrecisionRow, ServedRow

QUANTIZATION = "Quantization"
SERVED = "Served as trained"
SPEED = "Speed by phase"

PRECISION_HEADERS = [
    "Model", "Type", "Seeds", "Size MB", "Bits per weight", "AQI accuracy % [95%]", "Δ to f16, points [95%]",
    "Gained, lost", "Answers as f16 %", "Fallback tensors",
]  # fmt: skip
SERVED_HEADERS = [
    "Model", "Seed", "Backend", "Mode", "Prompts", "Rendered %", "Tokens %", "Answers %", "Adapter = merged %",
    "Perturbed adapter noticed",
]  # fmt: skip
_NOTICED = {True: "yes", False: "NO", None: "–"}


def precision_cells(row: PrecisionRow) -> list[str]:
    """One line of the table of precisions."""
    return [
        row.model_name,
        row.type,
        ", ".join(map(str, row.seeds)),
        number(row.megabytes, digits=2),
        number(row.bits_per_weight, digits=2),
        interval(row.accuracy),
        interval(row.delta, sign=True),
        "–" if row.delta is None else f"{row.gained}, {row.lost}",
        number(row.answers_equal),
        f"{row.fallbacks} of {row.tensors}",
    ]


def served_cells(row: ServedRow) -> list[str]:
    """One line of the table of servers."""
    return [
        row.model_name,
        str(row.seed),
        row.backend,
        row.mode,
        str(row.prompts) if row.prompts else "not supported",
        _told(row, row.rendered),
        _told(row, row.counted),
        number(row.answered),
        number(row.equal_to_merged),
        _NOTICED[row.perturbed_noticed],
    ]


def _told(row: ServedRow, share: float | None) -> str:
    return "not told" if row.prompts and share is None else number(share)


def sections(comparison: Comparison) -> list[str]:
    """Blocks of Markdown; a part of the pipeline that never ran has none."""
    blocks: list[str] = []
    if comparison.precisions:
        blocks += [f"## {QUANTIZATION}", _precision_words(comparison.precisions)]
        blocks.append(grid(PRECISION_HEADERS, [precision_cells(row) for row in comparison.precisions]))
    if comparison.served:
        blocks += [
            f"## {SERVED}",
            "Shares of the prompts on which the backend does as training did: rendered text, token ids (Ollama: their "
            "number), greedy answers of Hugging Face. Not told: the server is too old to say.",
            grid(
                [*SERVED_HEADERS, "First difference"],
                [[*served_cells(row), row.first_difference or "–"] for row in comparison.served],
            ),
        ]
    if comparison.phases:
        blocks += [
            f"## {SPEED}",
            "Medians over repetitions, one request at a time, without the warm-up; load and ttft (time to first token) "
            "for each request. The intervals are order statistics: few repetitions reach less than 95% confidence.",
            grid(
                ["Model", "Backend", "Phase", "Unit", "Median [interval]", "Confidence %", "Repetitions"],
                [_phase_cells(row) for row in comparison.phases],
            ),
        ]
    return blocks


def _phase_cells(row: PhaseRow) -> list[str]:
    digits = 2 if row.unit == "ms" else 0
    return [
        row.model_name,
        row.backend,
        row.phase,
        row.unit,
        interval(row.value, digits=digits),
        number(row.confidence),
        str(row.repetitions),
    ]


def _precision_words(rows: Sequence[PrecisionRow]) -> str:
    items = ", ".join(str(n) for n in sorted({row.items for row in rows}))
    words = [
        f"Each model in other precisions, on the same {items} test items through llama.cpp. Size is that of the file, "
        "bits per weight that of the tensors. Gained and lost are items that turn right or wrong against f16; the "
        "difference's interval pairs items, and one of no width means that none turned, not that none could."
    ]
    if any(len({row.seeds for row in rows if row.arm == arm}) > 1 for arm in {row.arm for row in rows}):
        words.append(
            "A line is about its seeds alone, and its difference is to f16 with the same seeds; lines with other seeds "
            "are not to be held against each other."
        )
    if any(row.fallbacks for row in rows):
        words.append(
            "Fallback tensors have rows that are no multiple of the format's block, and llama.cpp stored them in a "
            "larger one: the size says less than the name of the type."
        )
    return " ".join(words)


def print_serving(comparison: Comparison, console: Console) -> None:
    """Print precisions and servers as tables; nothing where neither was measured."""
    if comparison.precisions:
        _print(console, QUANTIZATION, PRECISION_HEADERS, [precision_cells(row) for row in comparison.precisions])
    if comparison.served:
        _print(console, SERVED, SERVED_HEADERS, [served_cells(row) for row in comparison.served])
        for row in comparison.served:
            if row.first_difference:
                line = f"{row.model_name} seed {row.seed}, {row.backend}, {row.mode}: {row.first_difference}"
                console.print(Text(line, style="dim"), soft_wrap=not console.is_terminal)


def _print(console: Console, title: str, headers: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for position, header in enumerate(headers):
        table.add_column(header, justify="left" if position == 0 else "right", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))  # Text: a name in brackets is no markup
    if not console.is_terminal:  # in a pipe, each line whole
        needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        console.width = max(console.width, needed)
    console.print(table)
