"""Whether an engine answers as the trained model does, prompt by prompt, against what the export stage wrote down.

reference.jsonl beside each GGUF has Hugging Face's own tokens and greedy answers, so an engine can be checked from any
machine that has the folder, without torch. Each prompt is asked in several forms, as people do. In mode adapter the
check is checked as well: with the adapter at another scale at least one answer must differ, or none of it could have
seen a fault.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from rich.console import Console
from rich.table import Table

from db.files import sha256
from db.records import VerificationRecord
from export import MergedOnlyError
from export.diagnosis import Case, ask, explain, gaps, same_tokens
from export.engines.engine import Engine, Generation
from export.engines.ollama_engine import OllamaEngine
from export.gguf import changes_nothing
from export.served import MODES, Mode, Reference, Served, read_references

Opener = Callable[[Served, float], AbstractContextManager[Engine]]
"""(model in its mode, factor on the adapter's own scale, for controls) → the open model."""

CONTROL_SCALE = 0.5
"""Factor on the adapter's scale in the control; what a lost α of twice the rank amounts to."""
LEAST_QUANTIZED = 0.25
"""Share of answers that a model quantized on purpose must give as Hugging Face does at 16 bits.

Sound quantization changes a token here and there; gibberish equals no answer at all.
"""


MOST_TIES = 0.25
"""Share of answers that may part at a tie.

Of 830 answers of sound models 3 were others on a server than in the process. Where weights are lost all tokens are
about equally likely, and every answer is a tie.
"""


class Checked(VerificationRecord):
    name: str
    unsupported: bool = False  # the server cannot serve this mode
    quantization: str  # in which the model was exported to be served
    differences: str | None = None  # settings stored otherwise than exported
    note: str | None = None  # what the server does not tell, or that a copy was asked
    answers: tuple[str, ...] = ()  # to all prompts, in order
    answer_tokens: tuple[int | None, ...] = ()
    ties: tuple[bool, ...] = ()  # which of them part at a tie
    equal_to_llama_cpp: float | None = None  # share of answers equal to llama.cpp's of the same files
    tokens_as_llama_cpp: float | None = None  # share of these that have as many tokens


def problems(rows: Sequence[Checked], least: float, least_quantized: float = LEAST_QUANTIZED) -> list[str]:
    """Why models must not be used, one text for each with its mode and engine; shares are over all forms.

    `least` is the share of equal answers that is asked of 16-bit models, and of two engines with the same files;
    `least_quantized` that of a model quantized on purpose (how often it answers as f16 is in parity.json). Answers that
    part at a tie count as equal.
    """
    models: dict[tuple[str, str, str], list[Checked]] = {}
    for row in rows:
        if not row.unsupported:  # which is no fault of the model
            models.setdefault((row.name, row.backend, row.mode), []).append(row)
    found = []
    for (name, backend, mode), forms in models.items():
        if wrong := _wrong(forms, least, least_quantized):
            worst = min(forms, key=lambda row: sum(s or 0 for s in (row.rendered, row.counted, row.answered, row.tied)))
            found.append(f"{name} ({backend}, {mode}): {'; '.join(wrong)}. {worst.first_difference or ''}".rstrip())
    return found


def _wrong(forms: Sequence[Checked], least: float, least_quantized: float) -> list[str]:
    first = forms[0]
    own = least if first.quantization in ("f32", "f16", "bf16") else least_quantized

    def over(*names: str) -> float | None:
        told = [row for row in forms if getattr(row, names[0]) is not None]
        counts = sum(round((getattr(row, name) or 0) * row.prompts) for row in told for name in names)
        return counts / sum(row.prompts for row in told) if told else None

    shares = (
        ("prompts rendered as in training", over("rendered"), 1.0),
        ("prompts read as the same tokens", over("counted"), 1.0),
        # An adapter lies on the base's f16 file, however the merged models are quantized.
        ("answers equal to Hugging Face's", over("answered", "tied"), own if first.adapter_sha256 is None else least),
        ("answers equal to mode merged", over("equal_to_merged"), own),
        ("answers equal to llama.cpp's of the same files", over("equal_to_llama_cpp"), least),
        ("equal answers with as many tokens as in llama.cpp", over("tokens_as_llama_cpp"), least),
    )
    wrong = [
        f"{what}: expected {wanted:.0%}, got {share:.0%}"
        for what, share, wanted in shares
        if share is not None and share < wanted
    ]
    if (tied := over("tied") or 0) > MOST_TIES:
        wrong.append(f"answers that part at a tie: expected at most {MOST_TIES:.0%}, got {tied:.0%}; are weights lost?")
    if any(row.perturbed_noticed is False for row in forms):
        wrong.append("a perturbed adapter is not noticed")
    if first.differences:
        wrong.append(
            f"the server stored other settings than were exported ({first.differences}); register it again with "
            "`python -m export.ollama create`"
        )
    return wrong


def verify(
    opener: Opener,
    served: Served,
    modes: Sequence[Mode] = MODES,
    limit: int | None = None,
    control_scale: float = CONTROL_SCALE,
) -> list[Checked]:
    """Hold one model, given in mode merged, against its reference, in one mode or both.

    A model that has no adapter of its own (the base, or what can only be served merged) has no row in mode adapter,
    except for the base where that is the only mode asked for. Raises ExportError: the engine cannot be asked, or there
    is no reference.
    """
    references = read_references(served.folder, limit)
    adapted = served.adapter_form()
    merged = _ask(opener, served, references, "merged" if "merged" in modes or adapted else "adapter")
    rows = merged if "merged" in modes or adapted is None else []
    if "adapter" in modes and adapted is not None:
        rows = [*rows, *_adapter_rows(opener, adapted, references, merged, control_scale)]
    return rows


def _ask(opener: Opener, served: Served, references: Sequence[Reference], mode: Mode) -> list[Checked]:
    """A row for each form."""
    with opener(served, 1.0) as engine:
        stored = engine.stored if isinstance(engine, OllamaEngine) else None
        rows = []
        for form in dict.fromkeys(reference.form for reference in references):
            own = [reference for reference in references if reference.form == form]
            seen = [ask(engine, reference) for reference in own]
            case = Case(engine, served, own, seen, gaps(engine, served, own, seen))
            pairs = list(zip(own, seen, strict=True))
            rows.append(
                Checked(
                    name=served.name,
                    mode=mode,
                    form=form,
                    backend=engine.name,
                    backend_version=engine.version,
                    prompts=len(pairs),
                    rendered=_share([None if s.rendered is None else s.rendered == r.rendered for r, s in pairs]),
                    counted=_share([same_tokens(r, s) for r, s in pairs]),
                    answered=_share([s.text == r.answer for r, s in pairs]),
                    tied=_share(case.ties),
                    equal_to_merged=None,
                    perturbed_noticed=None,
                    first_difference=explain(case),
                    quantization=served.serving.quantization,
                    gguf_sha256=sha256(served.gguf),
                    adapter_sha256=sha256(served.adapter) if served.adapter else None,
                    server_digest=stored.digest if stored else None,
                    stored_sha256=stored.stored_sha256 if stored else None,
                    differences="; ".join(stored.differences(served.serving)) or None if stored else None,
                    note=". ".join(filter(None, (engine.note, *_untold(engine, seen)))) or None,
                    answers=tuple(s.text for s in seen),
                    answer_tokens=tuple(s.answer_tokens for s in seen),
                    ties=tuple(case.ties),
                )
            )
        return rows


def _untold(engine: Engine, seen: Sequence[Generation]) -> list[str]:
    """What an older server leaves out, and what is not checked therefore."""
    missing = (
        ("rendered", "how it renders prompts, so TEMPLATE is not checked", any(s.rendered is None for s in seen)),
        ("counted", "how many tokens it reads, so BOS is not checked", any(s.prompt_tokens is None for s in seen)),
    )
    who = f"{engine.name} {engine.version} does not tell"
    return [f"{who} {what} (no share {share!r}); upgrade it" for share, what, untold in missing if untold]


def _share(equal: Sequence[bool | None]) -> float | None:
    """Share of prompts that are equal.

    Where some are not told, it is None, unless one that is told differs: then it is the share of those that are told.
    """
    told = [flag for flag in equal if flag is not None]
    return None if not equal or (len(told) < len(equal) and all(told)) else sum(told) / len(told)


def _adapter_rows(
    opener: Opener, adapted: Served, references: Sequence[Reference], merged: Sequence[Checked], control_scale: float
) -> list[Checked]:
    """The control is of the first form."""
    try:
        first, *others = _ask(opener, adapted, references, "adapter")
        with opener(adapted, control_scale) as engine:
            perturbed = tuple(ask(engine, one).text for one in references if one.form == first.form)
    except MergedOnlyError as error:
        untold = ("rendered", "counted", "answered", "tied", "server_digest", "stored_sha256", "differences", "note")
        nothing: dict[str, None] = dict.fromkeys(untold)
        files = {"gguf_sha256": sha256(adapted.gguf), "adapter_sha256": adapted.adapter and sha256(adapted.adapter)}
        kept = {"first_difference": f"not supported: {error}", "unsupported": True, "prompts": 0, "answers": ()}
        return [merged[0].model_copy(update={**nothing, **files, **kept, "mode": "adapter"})]
    noticed = first.answers != perturbed
    why = None if noticed else _blind(adapted, control_scale, first.prompts)
    said = " ".join(filter(None, (first.first_difference, why))) or None
    first = first.model_copy(update={"perturbed_noticed": noticed, "first_difference": said})
    return [
        row.model_copy(update={"equal_to_merged": _alike(row, other)})
        for row, other in zip([first, *others], merged, strict=True)
    ]


def _alike(row: Checked, other: Checked) -> float:
    """Share of prompts with the same answer; where one of the two parts from the reference at a tie, either will do."""
    pairs = zip(row.answers, other.answers, row.ties, other.ties, strict=True)
    return sum(a == b or tie or also for a, b, tie, also in pairs) / row.prompts


def _blind(adapted: Served, scale: float, prompts: int) -> str:
    if adapted.adapter is not None and changes_nothing(adapted.adapter):
        return "The adapter changes nothing: all its B (or all its A) are zero; was it trained?"
    return (
        f"With the adapter at {scale} of its scale none of {prompts} answers differs, so this check sees no fault of "
        "the adapter; ask more prompts, or the adapter hardly changes the base"
    )


def against(rows: Sequence[Checked], others: Sequence[Checked]) -> list[Checked]:
    """The rows held against the others, llama.cpp's, where they are of the same prompts and files."""
    known = {(o.mode, o.form, o.gguf_sha256, o.adapter_sha256): o for o in others}
    found = []
    for row in rows:
        other = known.get((row.mode, row.form, row.gguf_sha256, row.adapter_sha256))
        if other is not None and row.prompts == other.prompts:
            told = [
                n == m
                for n, m, a, b in zip(row.answer_tokens, other.answer_tokens, row.answers, other.answers, strict=True)
                if a == b and n is not None
            ]
            shares = {"equal_to_llama_cpp": _alike(row, other), "tokens_as_llama_cpp": _share(told)}
            row = row.model_copy(update=shares)
        found.append(row)
    return found


# --- shown ----------------------------------------------------------------------------------------------------------


def show(rows: Sequence[Checked]) -> None:
    """Print the table, and below it what is to be said of single rows.

    It is wide enough where the output is a file, in whose 80 columns the engines' names would be cut.
    """
    engines = ", ".join(dict.fromkeys(f"{row.backend} {row.backend_version}" for row in rows))
    columns = "model", "mode", "form", "engine", "prompts", "rendered", "tokens", "answers", "ties", "= merged"
    table = Table(*columns, "control noticed", title=f"Equal to training: {engines}", title_justify="left")
    for row in rows:
        if row.unsupported:
            table.add_row(row.name, row.mode, "", row.backend, "not supported")
            continue
        shares = (row.rendered, row.counted, row.answered, row.tied, row.equal_to_merged)
        percents = ["" if share is None else f"{100 * share:.0f}%" for share in shares]
        noticed = {True: "yes", False: "NO", None: ""}[row.perturbed_noticed]
        table.add_row(row.name, row.mode, row.form, row.backend, str(row.prompts), *percents, noticed)
    console = Console()
    Console(width=None if console.is_terminal or "COLUMNS" in os.environ else 140).print(table)
    lines = []
    for row in rows:
        stored = row.differences and f"the server stored other settings than were exported: {row.differences}"
        lines += [f"{row.name} ({row.mode}, {row.form}): {row.first_difference}"] if row.first_difference else []
        lines += [f"{row.name} ({row.mode}): {remark}" for remark in (stored, row.note) if remark]
    print(*dict.fromkeys(lines), sep="\n", end="\n" if lines else "")
