"""Proof that an export answers as the trained model does, prompt by prompt.

`prove` compares the files with Hugging Face itself, by token ids, before anything is written: the rendered text goes to
llama.cpp in this process. `verify` compares whatever serves the files (llama.cpp, Ollama) with what Hugging Face
answered then: reference.jsonl beside each GGUF has its tokens and greedy answers, so this needs no torch. It asks each
prompt in several forms, as people do, and checks itself: with the adapter at another scale at least one answer must
differ. Both give the same rows, which `problems` judges.

Merging rounds weights to 16 bit and engines add in different orders, so logits differ a little; llama.cpp also rounds
the inputs of products with 16-bit weights, and keys and values, to 16 bit. Where the reference's best two tokens are
closer than that, either may be chosen. `export.diagnosis` names such ties and every other cause.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from db.files import sha256
from db.records import VerificationRecord, VerifyRecord
from export import MergedOnlyError
from export.diagnosis import Case, ask, explain, gaps, same_tokens
from export.engines.engine import Engine, Generation, LocalEngine, Raw
from export.engines.llama_cpp import LlamaCppEngine
from export.engines.ollama_engine import OllamaEngine
from export.served import MODES, Mode, Reference, Served, read_references

Opener = Callable[[Served, float], AbstractContextManager[Engine]]
"""(model in its mode, factor on the adapter's scale, for controls) → the open model."""

CONTROL_SCALE = 0.5
"""Factor on the adapter's scale in the control; as if α belonged to twice the rank."""
LEAST_QUANTIZED = 0.25
"""Share of answers that a deliberately quantized model must have in common with Hugging Face at 16 bits.

Sound quantization changes a token here and there; gibberish matches no answer at all.
"""
MOST_TIES = 0.25
"""Largest share of answers that may diverge at a tie.

Of 830 answers of sound models 3 differed between a server and this process. Where weights are lost all tokens are about
equally likely, and every answer is a tie.
"""


class Checked(VerificationRecord):
    name: str
    unsupported: bool = False  # the server cannot serve this mode
    quantization: str  # of the exported model
    differences: str | None = None  # settings that the server stored differently
    note: str | None = None  # that a temporary copy was asked
    answers: tuple[str, ...] = ()  # to all prompts, in order
    answer_tokens: tuple[int | None, ...] = ()
    ties: tuple[bool, ...] = ()  # which answers diverge at a tie
    equal_to_llama_cpp: float | None = None  # share of answers equal to llama.cpp's from the same files
    tokens_as_llama_cpp: float | None = None  # share of these with the same number of tokens


# --- the files, beside Hugging Face -------------------------------------------------------------------------------


def prove(
    reference: Callable[[], LocalEngine],
    opener: Callable[[Served], LlamaCppEngine],
    forms: Sequence[Served],
    prompts: Sequence[str],
    max_tokens: int,
) -> tuple[list[Checked], dict[str, Mapping[str, Any]]]:
    """Compare 16-bit files, a model in each of its modes, with `reference`, Hugging Face, by ids and not by text.

    `prompts` are rendered. Returns a row for each mode, and rendered prompt → Hugging Face's ids and answer. Only one
    engine is open at a time: memory need not hold two models.
    """
    with reference() as trained:
        asked = trained.generate_many([*map(Raw, prompts)], max_tokens)
        by_place: dict[int, Generation] = dict(tqdm(asked, total=len(prompts), desc="Hugging Face", delay=10))
    answers = [by_place[place] for place in range(len(prompts))]
    references = [
        Reference(Raw(prompt), prompt, answer.prompt_ids or [], answer.text, max_tokens, "rendered", ())
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    rows = []
    for served in forms:
        with opener(served) as engine:
            given = _ask_all(engine, served, references, "rendered")
            # Equal ids are equal answers, also where half a character at the end is written in two ways.
            pairs = zip(given, answers, strict=True)
            given = [replace(got, text=right.text) if got.ids == right.ids else got for got, right in pairs]
            rows.append(_row(engine, served, references, given, quantization="f16"))
    return rows, {one.rendered: {"ids": one.ids, "answer": one.answer} for one in references}


# --- whatever serves the files, beside reference.jsonl ------------------------------------------------------------


def verify(
    opener: Opener,
    served: Served,
    modes: Sequence[Mode] = MODES,
    limit: int | None = None,
    control_scale: float = CONTROL_SCALE,
) -> list[Checked]:
    """Compare one model, given in mode merged, with its reference, in one mode or both.

    A model without an adapter (the base, or what can only be served merged) has no row in mode adapter, except for the
    base when that is the only mode asked for. Raises ExportError: the engine cannot be asked, or there is no reference.
    """
    references = read_references(served.folder, limit)
    adapted = served.adapter_form()
    merged = _check(opener, served, references, "merged" if "merged" in modes or adapted else "adapter")
    rows = merged if "merged" in modes or adapted is None else []
    if "adapter" in modes and adapted is not None:
        rows = [*rows, *_adapter_rows(opener, adapted, references, merged, control_scale)]
    return rows


def _ask_all(engine: Engine, served: Served, references: Sequence[Reference], mode: str) -> list[Generation]:
    bar = tqdm(references, desc=f"verify {served.name} {mode} {references[0].form}", delay=10)
    return [ask(engine, reference) for reference in bar]


def _row(
    engine: Engine, served: Served, references: Sequence[Reference], given: Sequence[Generation], **changes: Any
) -> Checked:
    """The answers to the references, all of one form, compared with them."""
    case = Case(engine, served, references, given, gaps(engine, served, references, given))
    pairs = list(zip(references, given, strict=True))
    stored = engine.stored if isinstance(engine, OllamaEngine) else None
    figures = {
        "name": served.name,
        "mode": served.mode,
        "form": references[0].form,
        "backend": engine.name,
        "backend_version": engine.version,
        "prompts": len(references),
        "rendered": _share([None if got.rendered is None else got.rendered == one.rendered for one, got in pairs]),
        "counted": _share([same_tokens(one, got) for one, got in pairs]),
        "answered": _share([got.text == one.answer for one, got in pairs]),
        "tied": _share(case.ties),
        "equal_to_merged": None,
        "perturbed_noticed": None,
        "first_difference": explain(case),
        "gguf_sha256": sha256(served.gguf),
        "adapter_sha256": sha256(served.adapter) if served.adapter else None,
        "server_digest": stored.digest if stored else None,
        "stored_sha256": stored.stored_sha256 if stored else None,
        "quantization": served.serving.quantization,
        "differences": "; ".join(stored.differences(served.serving)) or None if stored else None,
        "note": engine.note,
        "answers": tuple(got.text for got in given),
        "answer_tokens": tuple(got.answer_tokens for got in given),
        "ties": tuple(case.ties),
    }
    return Checked.model_validate(figures | changes)


def _check(opener: Opener, served: Served, references: Sequence[Reference], mode: Mode) -> list[Checked]:
    """A row for each form."""
    with opener(served, 1.0) as engine:
        rows = []
        for form in dict.fromkeys(reference.form for reference in references):
            asked = [reference for reference in references if reference.form == form]
            rows.append(_row(engine, served, asked, _ask_all(engine, served, asked, mode), mode=mode))
        return rows


def _share(equal: Sequence[bool | None]) -> float | None:
    """Share of prompts that are equal.

    Where some are unknown it is None, unless a known one differs: then it is the share of the known ones.
    """
    known = [flag for flag in equal if flag is not None]
    return None if not equal or (len(known) < len(equal) and all(known)) else sum(known) / len(known)


def _adapter_rows(
    opener: Opener, adapted: Served, references: Sequence[Reference], merged: Sequence[Checked], control_scale: float
) -> list[Checked]:
    """The control uses the first form."""
    try:
        first, *others = _check(opener, adapted, references, "adapter")
        with opener(adapted, control_scale) as engine:
            perturbed = tuple(ask(engine, one).text for one in references if one.form == first.form)
    except MergedOnlyError as error:
        blank = ("rendered", "counted", "answered", "tied", "server_digest", "stored_sha256", "differences", "note")
        nothing: dict[str, None] = dict.fromkeys(blank)
        files = {"gguf_sha256": sha256(adapted.gguf), "adapter_sha256": adapted.adapter and sha256(adapted.adapter)}
        rest = {"first_difference": f"not supported: {error}", "unsupported": True, "prompts": 0, "answers": ()}
        return [merged[0].model_copy(update={**nothing, **files, **rest, "mode": "adapter"})]
    noticed = first.answers != perturbed
    blind = (
        f"With the adapter at {control_scale} of its scale none of {first.prompts} answers differs, so this check "
        "would miss a fault of the adapter; ask more prompts, or the adapter hardly changes the base"
    )
    why = None if noticed else blind
    difference = " ".join(filter(None, (first.first_difference, why))) or None
    first = first.model_copy(update={"perturbed_noticed": noticed, "first_difference": difference})
    return [
        row.model_copy(update={"equal_to_merged": _alike(row, other)})
        for row, other in zip([first, *others], merged, strict=True)
    ]


def _alike(row: Checked, other: Checked) -> float:
    """Share of prompts with the same answer; where either diverges from the reference at a tie, both answers count."""
    pairs = zip(row.answers, other.answers, row.ties, other.ties, strict=True)
    return sum(a == b or tie or also for a, b, tie, also in pairs) / row.prompts


def against(rows: Sequence[Checked], others: Sequence[Checked]) -> list[Checked]:
    """The rows compared with the others, llama.cpp's, where prompts and files are the same."""
    local = {(o.mode, o.form, o.gguf_sha256, o.adapter_sha256): o for o in others}
    compared = []
    for row in rows:
        other = local.get((row.mode, row.form, row.gguf_sha256, row.adapter_sha256))
        if other is not None and row.prompts == other.prompts:
            counts = zip(row.answer_tokens, other.answer_tokens, row.answers, other.answers, strict=True)
            same = _share([n == m for n, m, a, b in counts if a == b and n is not None])
            shares = {"equal_to_llama_cpp": _alike(row, other), "tokens_as_llama_cpp": same}
            row = row.model_copy(update=shares)
        compared.append(row)
    return compared


def verify_record(arm: str, seed: int, name: str, rows: Sequence[VerificationRecord]) -> VerifyRecord:
    fields = [row.model_dump(include=set(VerificationRecord.model_fields)) for row in rows]
    return VerifyRecord.of({"schema": 1, "arm": arm, "seed": seed, "model_name": name, "rows": fields})


# --- the judgement ------------------------------------------------------------------------------------------------


def problems(rows: Sequence[Checked], least: float, least_quantized: float = LEAST_QUANTIZED) -> list[str]:
    """Why models must not be used, one text for each with its mode and engine; shares are over all forms.

    `least` is the share of equal answers required of 16-bit models, and of two engines with the same files;
    `least_quantized` that of a deliberately quantized model. Answers that diverge at a tie count as equal.
    """
    models: dict[tuple[str, str, str], list[Checked]] = {}
    for row in rows:
        if not row.unsupported:  # which is no fault of the model
            models.setdefault((row.name, row.backend, row.mode), []).append(row)
    texts = []
    for (name, backend, mode), forms in models.items():
        if wrong := _wrong(forms, least, least_quantized):
            worst = min(forms, key=lambda row: sum(s or 0 for s in (row.rendered, row.counted, row.answered, row.tied)))
            texts.append(f"{name} ({backend}, {mode}): {'; '.join(wrong)}. {worst.first_difference or ''}".rstrip())
    return texts


def _wrong(forms: Sequence[Checked], least: float, least_quantized: float) -> list[str]:
    first = forms[0]
    least_here = least if first.quantization in ("f32", "f16", "bf16") else least_quantized

    def over(*names: str) -> float | None:
        rows = [row for row in forms if getattr(row, names[0]) is not None]
        counts = sum(round((getattr(row, name) or 0) * row.prompts) for row in rows for name in names)
        return counts / sum(row.prompts for row in rows) if rows else None

    shares = (
        ("prompts rendered as in training", over("rendered"), 1.0),
        ("prompts read as the same tokens", over("counted"), 1.0),
        # An adapter sits on the base's f16 file, however the merged models are quantized.
        ("answers equal to Hugging Face's", over("answered", "tied"), least if first.adapter_sha256 else least_here),
        ("answers equal to mode merged", over("equal_to_merged"), least_here),
        ("answers equal to llama.cpp's of the same files", over("equal_to_llama_cpp"), least),
        ("equal answers with as many tokens as in llama.cpp", over("tokens_as_llama_cpp"), least),
    )
    wrong = [
        f"{what}: expected {expected:.0%}, got {share:.0%}"
        for what, share, expected in shares
        if share is not None and share < expected
    ]
    if (tied := over("tied") or 0) > MOST_TIES:
        wrong.append(
            f"answers that diverge at a tie: expected at most {MOST_TIES:.0%}, got {tied:.0%}; are weights lost?"
        )
    if any(row.perturbed_noticed is False for row in forms):
        wrong.append("a perturbed adapter is not noticed")
    if first.differences:
        wrong.append(
            f"the server stored other settings than were exported ({first.differences}); register it again with "
            "`python -m export.ollama create`"
        )
    return wrong


def show(rows: Sequence[Checked]) -> None:
    """Print the table, and below it the remarks on single rows.

    It is 140 columns wide where the output is a file, whose 80 columns would cut the engines' names.
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
