"""Proof that an export answers as the trained model does, prompt by prompt.

`prove` compares engines in this process with Hugging Face itself, token by token, before anything is written.
`verify` compares whatever serves the files (llama.cpp, Ollama) with what Hugging Face answered then: reference.jsonl
beside each GGUF has its tokens and greedy answers, so this needs no torch. It asks each prompt in several forms, as
people do, and checks itself: with the adapter at another scale at least one answer must differ.

Merging rounds weights to 16 bit and engines add in different orders, so logits differ a little; llama.cpp also rounds
the inputs of products with 16-bit weights, and keys and values, to 16 bit. Where the reference's best two tokens are
closer than that, either may be chosen. `export.diagnosis` names such ties and every other cause.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from rich.console import Console
from rich.table import Table

from db.files import sha256
from db.records import VerificationRecord
from export import MergedOnlyError
from export.diagnosis import TIE, Case, ask, bos_cause, explain, gaps, parting, same_tokens
from export.engines.engine import Engine, Generation, LocalEngine
from export.engines.ollama_engine import OllamaEngine
from export.gguf import changes_nothing
from export.served import MODES, Mode, Reference, Served, read_references

Opener = Callable[[Served, float], AbstractContextManager[Engine]]
"""(model in its mode, factor on the adapter's scale, for controls) → the open model."""
REFERENCE = "hf"

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


# --- engines in this process, beside Hugging Face -----------------------------------------------------------------


@dataclass(frozen=True)
class _Answers:
    ids: list[list[int]]  # the engine's ids of each prompt
    made: list[Generation]
    texts: dict[tuple[int, ...], str]  # ids of a prompt or an answer → its text

    @property
    def tokens(self) -> list[list[int]]:
        return [generation.ids or [] for generation in self.made]


def prove(
    reference: Callable[[], LocalEngine],
    engines: Mapping[str, Callable[[], LocalEngine]],
    prompts: Sequence[str],
    max_tokens: int,
) -> dict[str, Any]:
    """Compare every engine with `reference`, Hugging Face. Only one is open at a time: memory need not hold two models.

    `prompts` are rendered. token_ids_equal and greedy_equal are shares, of the worst pair; greedy_tied is the share of
    prompts that diverge at a tie (still a difference), of the worst pair; pairs, token_id_pairs and tied_pairs are each
    pair's shares. Greedy answers continue the reference's ids, so that a tokenizer's fault is counted once. The first
    engine is asked before the reference, which then only checks whether it would answer the same.
    """
    first = next(iter(engines))
    guess = _answers(engines[first], prompts, max_tokens)
    right = _answers(reference, prompts, max_tokens, guesses=guess.tokens)
    greedy_pairs: dict[str, float] = {}
    id_pairs: dict[str, float] = {}
    tied: dict[str, float] = {}
    differences: list[dict[str, Any]] = []
    for name, opener in engines.items():
        reuse = name == first and guess.ids == right.ids
        answers = guess if reuse else _answers(opener, prompts, max_tokens, given=right.ids)
        pair = f"{REFERENCE}/{name}"
        for kind, expected, got, shares in (
            ("token_ids", right.ids, answers.ids, id_pairs),
            ("greedy", right.tokens, answers.tokens, greedy_pairs),
        ):
            places = {n: parting(a, b) for n, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b}
            leads = {n: _lead(right.made[n], at) if kind == "greedy" else None for n, at in places.items()}
            ties = {n for n, lead in leads.items() if lead is not None and lead < TIE}
            shares[pair] = (len(prompts) - len(places)) / len(prompts)
            if kind == "greedy":
                tied[pair] = len(ties) / len(prompts)
            for number, at in list(places.items())[:1]:
                a, b = expected[number], got[number]
                difference = {
                    "engine": name,
                    "kind": kind,
                    "prompt_number": number,
                    "prompt": prompts[number],
                    "position": at,
                    "expected_token": a[at] if at < len(a) else None,
                    "got_token": b[at] if at < len(b) else None,
                    "expected_text": right.texts[tuple(a)],
                    "got_text": answers.texts[tuple(b)],
                    "gap": leads[number],
                    "likely_cause": "rounding: the best two tokens are a tie" if number in ties else _cause(kind, a, b),
                }
                differences.append(difference)
    return {
        "prompts": len(prompts),
        "max_tokens": max_tokens,
        "reference": REFERENCE,
        "token_ids_equal": min(id_pairs.values()),
        "greedy_equal": min(greedy_pairs.values()),
        "greedy_tied": max(tied.values()),
        "tied_pairs": tied,
        "pairs": greedy_pairs,
        "token_id_pairs": id_pairs,
        "answers": {
            prompt: {"ids": ids, "answer": right.texts[tuple(tokens)]}
            for prompt, ids, tokens in zip(prompts, right.ids, right.tokens, strict=True)
        },
        "first_difference": min(differences, key=lambda d: d["prompt_number"]) if differences else None,
    }


def _answers(
    opener: Callable[[], LocalEngine],
    prompts: Sequence[str],
    max_tokens: int,
    guesses: Iterable[Sequence[int]] = repeat(()),
    given: Sequence[list[int]] | None = None,
) -> _Answers:
    """An engine's ids of the prompts, and its answers to these or to `given`."""
    with opener() as engine:
        ids = [list(engine.tokenize(prompt)) for prompt in prompts]
        made = [engine.answer(x, max_tokens, guess=guess) for x, guess in zip(given or ids, guesses, strict=False)]
        answers = [generation.ids or [] for generation in made]
        return _Answers(ids, made, {tuple(x): engine.detokenize(x) for x in [*ids, *answers]})


def _lead(made: Generation, position: int) -> float | None:
    leads = made.leads or []
    return leads[position] if position < len(leads) else None


def _cause(kind: str, expected: Sequence[int], got: Sequence[int]) -> str:
    if kind == "token_ids":
        return bos_cause(expected, got) or "tokenizer or template"
    if parting(expected, got) in (len(expected), len(got)):
        return "end of sequence: one side stops where the other continues"
    return "adapter scale, merge or quantization"


def export_problem(result: Mapping[str, Any], min_greedy_equal: float) -> str | None:
    """Why an export must not be used, or None when it may; `result` is that of `prove`."""
    problems = []
    if result["token_ids_equal"] < 1.0:
        problems.append(f"token ids: expected equal for 100% of prompts, got {result['token_ids_equal']:.1%}")
    if result["greedy_equal"] < min_greedy_equal:
        problems.append(
            f"greedy answers: expected equal for {min_greedy_equal:.1%} of prompts, got {result['greedy_equal']:.1%} "
            f"({result['greedy_tied']:.1%} diverge at a tie, where rounding decides)"
        )
    if not problems:
        return None
    d = result["first_difference"]
    return (
        f"{'; '.join(problems)}. First difference: {d['engine']}, {d['kind']}, prompt {d['prompt_number']}, position "
        f"{d['position']}: expected token {d['expected_token']}, got {d['got_token']} "
        f"({d['expected_text']!r} against {d['got_text']!r}). Likely cause: {d['likely_cause']}"
    )


# --- whatever serves the files, beside reference.jsonl ------------------------------------------------------------


class Checked(VerificationRecord):
    name: str
    unsupported: bool = False  # the server cannot serve this mode
    quantization: str  # of the exported model
    differences: str | None = None  # settings that the server stored differently
    note: str | None = None  # what the server does not report, or that a temporary copy was asked
    answers: tuple[str, ...] = ()  # to all prompts, in order
    answer_tokens: tuple[int | None, ...] = ()
    ties: tuple[bool, ...] = ()  # which answers diverge at a tie
    equal_to_llama_cpp: float | None = None  # share of answers equal to llama.cpp's from the same files
    tokens_as_llama_cpp: float | None = None  # share of these with the same number of tokens


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


def _check(opener: Opener, served: Served, references: Sequence[Reference], mode: Mode) -> list[Checked]:
    """A row for each form."""
    with opener(served, 1.0) as engine:
        stored = engine.stored if isinstance(engine, OllamaEngine) else None
        rows = []
        for form in dict.fromkeys(reference.form for reference in references):
            asked = [reference for reference in references if reference.form == form]
            answers = [ask(engine, reference) for reference in asked]
            case = Case(engine, served, asked, answers, gaps(engine, served, asked, answers))
            pairs = list(zip(asked, answers, strict=True))
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
                    note=". ".join(filter(None, (engine.note, *_unreported(engine, answers)))) or None,
                    answers=tuple(s.text for s in answers),
                    answer_tokens=tuple(s.answer_tokens for s in answers),
                    ties=tuple(case.ties),
                )
            )
        return rows


def _unreported(engine: Engine, answers: Sequence[Generation]) -> list[str]:
    """What an older server leaves out, and what therefore is not checked."""
    server = f"{engine.name} {engine.version} does not report"
    gaps = (
        ("rendered", "how it renders prompts, so TEMPLATE is not checked", any(a.rendered is None for a in answers)),
        ("counted", "how many tokens it reads, so BOS is not checked", any(a.prompt_tokens is None for a in answers)),
    )
    return [f"{server} {what} (no share {share!r}); upgrade it" for share, what, missing in gaps if missing]


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
    why = None if noticed else _blind(adapted, control_scale, first.prompts)
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


def _blind(adapted: Served, scale: float, prompts: int) -> str:
    if adapted.adapter is not None and changes_nothing(adapted.adapter):
        return "The adapter changes nothing: all its B (or all its A) are zero; was it trained?"
    return (
        f"With the adapter at {scale} of its scale none of {prompts} answers differs, so this check would miss a fault "
        "of the adapter; ask more prompts, or the adapter hardly changes the base"
    )


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
