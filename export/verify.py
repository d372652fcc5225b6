"""Whether an engine answers as the trained model does, prompt by prompt, against what the export stage wrote down.

reference.jsonl beside each GGUF has Hugging Face's own tokens and greedy answers, so an engine can be checked from any
machine that has the folder, without torch. In mode adapter the check is checked as well: with the adapter at another
scale at least one answer must differ, or none of it could have seen a fault.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.adapter_file import changes_nothing
from export.diagnosis import Case, explain, same_tokens
from export.engines import Backend, Reference, Seen
from export.errors import ExportError
from export.files import sha256
from export.ollama import AdaptersUnsupportedError
from export.serving import REFERENCE, Mode, Served
from export.verdict import Checked

CONTROL_SCALE = 0.5
"""Factor on the adapter's scale in the control; what a lost α of twice the rank amounts to."""


def read_references(folder: Path, limit: int | None = None) -> list[Reference]:
    """The answers beside a GGUF.

    Raises:
        ExportError: none there, or damaged.
    """
    file = folder / REFERENCE
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [Reference(**{k: row[k] for k in Reference.__dataclass_fields__}) for row in rows]
    except FileNotFoundError:
        raise ExportError(f"{file}: no such file; run `dvc repro export`, which writes it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{file}: expected Hugging Face's answers as JSON lines ({error}); export again") from error
    if not found:
        raise ExportError(f"{file}: expected at least one answer, found none; export again")
    return found[:limit]


def verify(
    backend: Backend,
    served: Served,
    modes: Sequence[Mode] = ("merged", "adapter"),
    limit: int | None = None,
    control_scale: float = CONTROL_SCALE,
) -> list[Checked]:
    """Hold one model against its reference, in one mode or both.

    Args:
        backend: Opens it.
        served: The model in mode merged.
        modes: Rows wanted. A model that has no adapter of its own (the base, or what can only be served merged) has no
            row in mode adapter, except for the base where that is the only mode asked for.
        limit: Prompts asked; None: all.
        control_scale: Factor on the adapter's scale in the control.

    Raises:
        OllamaError, ExportError: the engine cannot be asked, or there is no reference.
    """
    references = read_references(served.folder, limit)
    merged = _ask(backend, served, references)
    adapted = served.adapter_form()
    rows = []
    if "merged" in modes or adapted is None:
        mode: Mode = "merged" if "merged" in modes else "adapter"
        rows.append(_row(backend, served, references, merged, mode=mode))
    if "adapter" in modes and adapted is not None:
        rows.append(_adapter_row(backend, adapted, references, merged, control_scale))
    return rows


@dataclass(frozen=True)
class _Asked:
    """Answers of one opened model, and what it said about itself."""

    seen: list[Seen]
    first: str | None
    server_digest: str | None
    stored_sha256: str | None
    differences: str | None
    note: str | None


def _ask(
    backend: Backend, served: Served, references: Sequence[Reference], scale: float = 1.0, explains: bool = True
) -> _Asked:
    with backend.open(served, scale) as engine:
        seen = [engine.ask(reference) for reference in references]
        first = explain(Case(engine, served, references, seen)) if explains else None
        note = ". ".join(filter(None, (engine.note, *_untold(backend, seen)))) or None
        return _Asked(seen, first, engine.server_digest, engine.stored_sha256, engine.differences, note)


def _untold(backend: Backend, seen: Sequence[Seen]) -> list[str]:
    """What an older server leaves out, and what is not checked therefore."""
    missing = (
        ("rendered", "how it renders prompts, so TEMPLATE is not checked", any(s.rendered is None for s in seen)),
        ("counted", "how many tokens it reads, so BOS is not checked", any(s.tokens is None for s in seen)),
    )
    who = f"{backend.name} {backend.version} does not tell"
    return [f"{who} {what} (no share {share!r}); upgrade it" for share, what, untold in missing if untold]


def _row(
    backend: Backend,
    served: Served,
    references: Sequence[Reference],
    asked: _Asked,
    *,
    mode: Mode,
    equal_to_merged: float | None = None,
    noticed: bool | None = None,
    control: str | None = None,
) -> Checked:
    pairs = list(zip(references, asked.seen, strict=True))
    return Checked(
        name=served.name,
        arm=served.arm,
        mode=mode,
        backend=backend.name,
        backend_version=backend.version,
        prompts=len(references),
        rendered=_share([None if s.rendered is None else s.rendered == r.rendered for r, s in pairs]),
        counted=_share([same_tokens(r, s) for r, s in pairs]),
        answered=_share([s.text == r.answer for r, s in pairs]),
        equal_to_merged=equal_to_merged,
        perturbed_noticed=noticed,
        first=" ".join(filter(None, (asked.first, control))) or None,
        unsupported=False,
        quantization=served.facts.get("quantization", "f16"),
        gguf_sha256=sha256(served.gguf),
        adapter_sha256=sha256(served.adapter) if served.adapter else None,
        server_digest=asked.server_digest,
        stored_sha256=asked.stored_sha256,
        differences=asked.differences,
        note=asked.note,
        answers=tuple(s.text for s in asked.seen),
    )


def _share(equal: Sequence[bool | None]) -> float | None:
    """Share of prompts that are equal.

    Where some are not told, it is None, unless one that is told differs: then it is the share of those that are told.
    """
    told = [flag for flag in equal if flag is not None]
    return None if len(told) < len(equal) and all(told) else sum(told) / len(told)


def _adapter_row(
    backend: Backend, adapted: Served, references: Sequence[Reference], merged: _Asked, control_scale: float
) -> Checked:
    try:
        asked = _ask(backend, adapted, references)
        control = _ask(backend, adapted, references, control_scale, explains=False)
    except AdaptersUnsupportedError as error:
        return _unsupported(backend, adapted, str(error))
    texts, perturbed = [s.text for s in asked.seen], [s.text for s in control.seen]
    equal = sum(a == m.text for a, m in zip(texts, merged.seen, strict=True)) / len(texts)
    noticed = texts != perturbed
    why = None if noticed else _blind(adapted, control_scale, len(texts))
    return _row(
        backend, adapted, references, asked, mode="adapter", equal_to_merged=equal, noticed=noticed, control=why
    )


def _blind(adapted: Served, scale: float, prompts: int) -> str:
    if adapted.adapter is not None and changes_nothing(adapted.adapter):
        return "The adapter changes nothing: all its B (or all its A) are zero; was it trained?"
    return (
        f"With the adapter at {scale} of its scale none of {prompts} answers differs, so this check sees no fault of "
        "the adapter; ask more prompts, or the adapter hardly changes the base"
    )


def _unsupported(backend: Backend, adapted: Served, why: str) -> Checked:
    return Checked(
        name=adapted.name,
        arm=adapted.arm,
        mode="adapter",
        backend=backend.name,
        backend_version=backend.version,
        prompts=0,
        rendered=None,
        counted=None,
        answered=None,
        equal_to_merged=None,
        perturbed_noticed=None,
        first=f"not supported: {why}",
        unsupported=True,
        quantization=adapted.facts.get("quantization", "f16"),
        gguf_sha256=sha256(adapted.gguf),
        adapter_sha256=sha256(adapted.adapter) if adapted.adapter else None,
        server_digest=None,
        stored_sha256=None,
    )
