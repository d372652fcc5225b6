"""Whether an engine answers as the trained model does, prompt by prompt, against what the export stage wrote down.

reference.jsonl beside each GGUF has Hugging Face's own tokens and greedy answers, so an engine can be checked from any
machine that has the folder, without torch. In mode adapter the check is checked as well: with the adapter at another
scale at least one answer must differ, or none of it could have seen a fault.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from rich.console import Console
from rich.table import Table

from db.files import sha256
from db.records import VerificationRecord
from export.diagnosis import Case, ask, explain, same_tokens
from export.engines.base import Engine, Generation
from export.engines.ollama import AdaptersUnsupportedError, OllamaEngine
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


class Checked(VerificationRecord):
    name: str
    unsupported: bool = False  # the server cannot serve this mode
    quantization: str  # in which the model was exported to be served
    differences: str | None = None  # settings stored otherwise than exported
    note: str | None = None  # what the server does not tell, or that a copy was asked
    answers: tuple[str, ...] = ()  # to all prompts, in order
    equal_to_llama_cpp: float | None = None  # share of answers equal to llama.cpp's of the same files

    def problem(self, least: float, least_quantized: float = LEAST_QUANTIZED) -> str | None:
        """Why the model must not be used, or None when it may.

        `least` is the share of equal answers that is asked of 16-bit models, and of two engines with the same files;
        `least_quantized` that of a model quantized on purpose (how often it answers as f16 is in parity.json).
        """
        if self.unsupported:
            return None
        own = least if self.quantization in ("f32", "f16", "bf16") else least_quantized
        shares = (
            ("prompts rendered as in training", self.rendered, 1.0),
            ("prompts read as the same tokens", self.counted, 1.0),
            # An adapter lies on the base's f16 file, however the merged models are quantized.
            ("answers equal to Hugging Face's", self.answered, own if self.adapter_sha256 is None else least),
            ("answers equal to mode merged", self.equal_to_merged, own),
            ("answers equal to llama.cpp's of the same files", self.equal_to_llama_cpp, least),
        )
        wrong = [
            f"{what}: expected {wanted:.0%}, got {share:.0%}"
            for what, share, wanted in shares
            if share is not None and share < wanted
        ]
        if self.perturbed_noticed is False:
            wrong.append("a perturbed adapter is not noticed")
        if self.differences:
            wrong.append(
                f"the server stored other settings than were exported ({self.differences}); register it again with "
                "`python -m export.ollama create`"
            )
        if not wrong:
            return None
        return f"{self.name} ({self.backend}, {self.mode}): {'; '.join(wrong)}. {self.first_difference or ''}".rstrip()


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
    rows = [merged] if "merged" in modes or adapted is None else []
    if "adapter" in modes and adapted is not None:
        rows.append(_adapter_row(opener, adapted, references, merged, control_scale))
    return rows


def _ask(opener: Opener, served: Served, references: Sequence[Reference], mode: Mode) -> Checked:
    with opener(served, 1.0) as engine:
        seen = [ask(engine, reference) for reference in references]
        first = explain(Case(engine, served, references, seen))
        stored = engine.stored if isinstance(engine, OllamaEngine) else None
        pairs = list(zip(references, seen, strict=True))
        return Checked(
            name=served.name,
            mode=mode,
            backend=engine.name,
            backend_version=engine.version,
            prompts=len(pairs),
            rendered=_share([None if s.rendered is None else s.rendered == r.rendered for r, s in pairs]),
            counted=_share([same_tokens(r, s) for r, s in pairs]),
            answered=_share([s.text == r.answer for r, s in pairs]),
            equal_to_merged=None,
            perturbed_noticed=None,
            first_difference=first,
            quantization=served.serving.quantization,
            gguf_sha256=sha256(served.gguf),
            adapter_sha256=sha256(served.adapter) if served.adapter else None,
            server_digest=stored.digest if stored else None,
            stored_sha256=stored.stored_sha256 if stored else None,
            differences="; ".join(stored.differences(served.serving)) or None if stored else None,
            note=". ".join(filter(None, (engine.note, *_untold(engine, seen)))) or None,
            answers=tuple(s.text for s in seen),
        )


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


def _adapter_row(
    opener: Opener, adapted: Served, references: Sequence[Reference], merged: Checked, control_scale: float
) -> Checked:
    try:
        row = _ask(opener, adapted, references, "adapter")
        with opener(adapted, control_scale) as engine:
            perturbed = tuple(ask(engine, reference).text for reference in references)
    except AdaptersUnsupportedError as error:
        untold = ("rendered", "counted", "answered", "server_digest", "stored_sha256", "differences", "note")
        nothing: dict[str, None] = dict.fromkeys(untold)
        files = {"gguf_sha256": sha256(adapted.gguf), "adapter_sha256": adapted.adapter and sha256(adapted.adapter)}
        kept = {"first_difference": f"not supported: {error}", "unsupported": True, "prompts": 0, "answers": ()}
        return merged.model_copy(update={**nothing, **files, **kept, "mode": "adapter"})
    equal = sum(map(str.__eq__, row.answers, merged.answers)) / len(row.answers)
    noticed = row.answers != perturbed
    why = None if noticed else _blind(adapted, control_scale, row.prompts)
    said = " ".join(filter(None, (row.first_difference, why))) or None
    return row.model_copy(update={"equal_to_merged": equal, "perturbed_noticed": noticed, "first_difference": said})


def _blind(adapted: Served, scale: float, prompts: int) -> str:
    if adapted.adapter is not None and changes_nothing(adapted.adapter):
        return "The adapter changes nothing: all its B (or all its A) are zero; was it trained?"
    return (
        f"With the adapter at {scale} of its scale none of {prompts} answers differs, so this check sees no fault of "
        "the adapter; ask more prompts, or the adapter hardly changes the base"
    )


def against(rows: Sequence[Checked], others: Sequence[Checked]) -> list[Checked]:
    """The rows with `equal_to_llama_cpp`, where the others, llama.cpp's, are of the same prompts and files."""
    known = {(o.mode, o.gguf_sha256, o.adapter_sha256): o.answers for o in others}
    found = []
    for row in rows:
        answers = known.get((row.mode, row.gguf_sha256, row.adapter_sha256), ())
        if row.answers and len(row.answers) == len(answers):
            share = sum(map(str.__eq__, row.answers, answers)) / len(answers)
            row = row.model_copy(update={"equal_to_llama_cpp": share})
        found.append(row)
    return found


# --- shown ----------------------------------------------------------------------------------------------------------


def show(rows: Sequence[Checked]) -> None:
    """Print the table, and below it what is to be said of single rows.

    It is wide enough where the output is a file, in whose 80 columns the engines' names would be cut.
    """
    engines = ", ".join(dict.fromkeys(f"{row.backend} {row.backend_version}" for row in rows))
    columns = ("model", "mode", "engine", "prompts", "rendered", "tokens", "answers", "= merged", "control noticed")
    table = Table(*columns, title=f"Equal to training: {engines}", title_justify="left")
    for row in rows:
        if row.unsupported:
            table.add_row(row.name, row.mode, row.backend, "not supported")
            continue
        shares = (row.rendered, row.counted, row.answered, row.equal_to_merged)
        percents = ["" if share is None else f"{100 * share:.0f}%" for share in shares]
        noticed = {True: "yes", False: "NO", None: ""}[row.perturbed_noticed]
        table.add_row(row.name, row.mode, row.backend, str(row.prompts), *percents, noticed)
    console = Console()
    Console(width=None if console.is_terminal or "COLUMNS" in os.environ else 120).print(table)
    for row in rows:
        stored = row.differences and f"the server stored other settings than were exported: {row.differences}"
        for remark in filter(None, (row.first_difference, stored, row.note)):
            print(f"{row.name} ({row.mode}): {remark}")
