"""Sections of the report about what is served: precisions, servers against training, phases of a request."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from evaluation.comparison import Comparison
from evaluation.markdown import grid, interval, number
from evaluation.report_findings import gained_and_lost
from evaluation.serving import PhaseRow, PrecisionRow, ServedRow
from evaluation.terminal import print_grid

QUANTIZATION = "Quantization"
SERVED = "Served as trained"
SPEED = "Speed by phase"
PARITY = (
    "With `export.parity_arithmetic: f32` what the exported files hold is compared, without the rounding of the engine "
    f"that serves them; what is served stands under {SERVED}."
)

SERVED_HEADERS = [
    "Model", "Seed", "Backend", "Mode", "Prompts", "Rendered %", "Tokens %", "Answers %", "Adapter = merged %",
    "Perturbed adapter noticed",
]  # fmt: skip


def precision_headers(comparison: Comparison) -> list[str]:
    """Columns of the table of precisions."""
    title, counts = comparison.primary.title, gained_and_lost(all(row.binary for row in comparison.precisions))
    return [
        "Model", "Type", "Which seeds", "Size MB", "Bits per weight", f"{title} % [95%]", "Δ to f16, points [95%]",
        counts, "Answers as f16 %", "Fallback tensors",
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
        blocks.append(grid(precision_headers(comparison), [precision_cells(row) for row in comparison.precisions]))
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
    binary = all(row.binary for row in rows)
    counts, turned = ("Gained and lost", "turn right or wrong") if binary else ("Better and worse", "get more or less")
    words = [
        f"Each model in other precisions, on the same {items} test items through llama.cpp. Size is that of the file, "
        f"bits per weight that of the tensors. {counts} are items that {turned} against f16; the "
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
        headers = precision_headers(comparison)
        print_grid(console, QUANTIZATION, headers, [precision_cells(row) for row in comparison.precisions])
    if comparison.served:
        print_grid(console, SERVED, SERVED_HEADERS, [served_cells(row) for row in comparison.served])
        for row in comparison.served:
            if row.first_difference:
                line = f"{row.model_name} seed {row.seed}, {row.backend}, {row.mode}: {row.first_difference}"
                console.print(Text(line, style="dim"), soft_wrap=not console.is_terminal)
