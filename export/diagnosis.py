"""Why a served model differs from the trained one: the first differing token, and the cause.

Each cause has its own evidence:
    template       the rendered text differs;
    BOS            the text is equal, and the tokens are once the first one is put in front or taken away;
    stop           the answer is right with the stop words of training, or continues past the end token;
    rounding       llama.cpp, given the answer up to there, ranks both tokens at the top, almost equally likely;
    scale          base + adapter at another scale gives these answers, for all prompts tried;
    quantization   none of these, and the weights have fewer than 16 bits.
What remains is a fault of the weights (a damaged file, a bad merge), or of the server where llama.cpp gives the answers
of training from the same files.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export import ExportError
from export.engines.engine import Engine, Generation
from export.engines.llama_cpp import LlamaCppEngine, Vocabulary, open_in_process
from export.gguf import scale_of
from export.served import Reference, Served

# Logits. The lead of the best token over the second differed by at most 0.022 between Hugging Face (float32, adapter
# not merged) and the two f16 GGUF forms, over 1017 tokens of the tiny profile (docs/log/2026-11-21.md).
TIE = 0.025
SCALE_PROMPTS = 8
"""Prompts on which other scales are tried; those that differ come first."""
SCALE_AGREES = 0.85
"""Share of them that must give exactly these answers."""
NEAR = 16
"""Number of best tokens searched for those of the two answers; one that ties is among the first few."""
_SIXTEEN_BITS = (None, "F32", "F16", "BF16")


@dataclass(frozen=True)
class Case:
    """A model and its answers, `seen`, to each of `references`; its engine is still open."""

    engine: Engine
    served: Served
    references: Sequence[Reference]
    seen: Sequence[Generation]
    gaps: Sequence[float | None]  # see `gaps`

    @property
    def ties(self) -> list[bool]:
        return [gap is not None and gap < TIE for gap in self.gaps]


def parting(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Position of the first element in which two sequences differ; the shorter one's length where none does."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def bos_cause(expected: Sequence[int], got: Sequence[int]) -> str | None:
    """Which fault of BOS makes a prompt's ids these, or None where it is none."""
    if list(got[1:]) == list(expected):
        twice = got[:1] == expected[:1]
        return "BOS; " + ("it comes twice: the GGUF adds what is there" if twice else "training had none")
    if list(expected[1:]) == list(got):
        return "BOS; it is missing: the GGUF does not add it (add_bos_token)"
    return None


def ask(engine: Engine, reference: Reference, stop: Sequence[str] | None = None) -> Generation:
    """An engine's answer to one prompt, decoded as Hugging Face would; `rendered` is None where it is not reported."""
    answer = engine.generate(reference.asked, reference.max_tokens, stop)
    return replace(answer, text=as_decoded(answer.text, reference.answer), rendered=engine.render(reference.asked))


def as_decoded(text: str, answer: str) -> str:
    """An engine's text as Hugging Face, which says `answer`, would have decoded it.

    SentencePiece's decoder drops the blank of the first token; llama.cpp and Ollama keep it, since for them a prompt
    comes first. Other tokenizers keep it on both sides, so it is removed only where the rest then matches better.
    """
    bare = text.removeprefix(" ")
    return bare if parting(bare, answer) > parting(text, answer) else text


def same_tokens(reference: Reference, seen: Generation) -> bool | None:
    """Whether the prompt was read as the same tokens; where the engine only counts them, as many; None: unknown."""
    if seen.prompt_ids is None and seen.prompt_tokens is None:
        return None
    if seen.prompt_ids is None:
        return seen.prompt_tokens == len(reference.ids)
    return seen.prompt_ids == reference.ids


def explain(case: Case) -> str | None:
    """The first difference and its likely cause; a tie is reported only where nothing else differs."""
    for number in sorted(range(len(case.seen)), key=lambda number: case.ties[number]):
        try:
            difference = _difference(case, number)
        except ExportError as error:  # a file or a server that the diagnosis needs; what differs is known all the same
            difference = f"it is rendered, read or answered differently from training. Cause not found: {error}"
        if difference is not None:
            return f"prompt {number}: {difference}"
    return None


def _same_prompt(reference: Reference, seen: Generation) -> bool:
    return seen.rendered in (None, reference.rendered) and same_tokens(reference, seen) is not False


def _difference(case: Case, number: int) -> str | None:
    reference, seen = case.references[number], case.seen[number]
    if seen.rendered is not None and seen.rendered != reference.rendered:
        return _template(case.served, reference, seen.rendered)
    if same_tokens(reference, seen) is False:
        return _tokens(case.served.gguf, reference, seen)
    return _answer(case, number) if seen.text != reference.answer else None


def _answer(case: Case, number: int) -> str:
    reference, seen = case.references[number], case.seen[number]
    at, expected, got = first_token(case.served.gguf, reference.answer, seen.text)
    where = f"token {at} of the answer is {got!r}, expected {expected!r}"
    if case.ties[number]:
        return f"{where}. Likely cause: rounding; the two are a tie there ({case.gaps[number]:.3f} logits apart)"
    try:
        cause = _stop(case, reference, seen) or _scale(case) or _weights(case, reference)
    except ExportError as error:
        return f"{where}. Cause not found: {error}"
    return f"{where}. Likely cause: {cause}"


@contextmanager
def _local(engine: Engine, served: Served) -> Iterator[LlamaCppEngine]:
    """llama.cpp on the model's files; the engine that was asked where it is that."""
    if isinstance(engine, LlamaCppEngine):
        yield engine
    else:
        with open_in_process(served) as local:
            yield local


def gaps(
    engine: Engine, served: Served, references: Sequence[Reference], seen: Sequence[Generation]
) -> list[float | None]:
    """Gap in logits where each answer diverges from the reference; None where it does not, or the prompt differed.

    Also None where the weights have fewer bits than in training: such differences are not due to rounding.
    """
    parted = [_same_prompt(r, s) and s.text != r.answer for r, s in zip(references, seen, strict=True)]
    if not any(parted) or engine.precision not in _SIXTEEN_BITS:
        return [None] * len(parted)
    try:
        with _local(engine, served) as local, Vocabulary(served.gguf) as vocabulary:
            pairs = zip(parted, references, seen, strict=True)
            return [_gap(local, vocabulary, r, s.text) if p else None for p, r, s in pairs]
    except ExportError:  # the diagnosis says which file is missing or damaged
        return [None] * len(parted)


def _gap(local: LlamaCppEngine, vocabulary: Vocabulary, reference: Reference, text: str) -> float | None:
    """By how many logits the worse of the two diverging tokens falls short of the best token.

    llama.cpp is given what both answers have in common, so it can measure where a server diverges even if it does not
    itself. Two equally unlikely tokens are no tie. None: one of them is not among the best.
    """
    local.prefill(reference.ids)
    ids: list[int] = []
    while len(ids) < reference.max_tokens:
        logits = local.logits()
        best = logits.argsort()[::-1][:NEAR].tolist()
        expected, got = (
            next((token for token in best if _begins(vocabulary, [*ids, token], answer)), None)
            for answer in (reference.answer, text)
        )
        if expected is None or got is None:
            return None
        if expected != got:
            return float(logits[best[0]] - min(logits[expected], logits[got]))
        ids.append(got)
        local.feed(got)
    return None


def _begins(vocabulary: Vocabulary, ids: Sequence[int], answer: str) -> bool:
    """Whether an answer begins with these tokens; an end token must stand at its end."""
    whole = vocabulary.is_end(ids[-1])
    text = vocabulary.text(ids[:-1] if whole else ids)
    both = (text, text.removeprefix(" "))  # see `as_decoded`
    return answer in both if whole else answer.startswith(both)


def first_token(gguf: Path, expected: str, got: str) -> tuple[int, str, str]:
    """Position of the first token in which two answers differ, and its text on both sides ("" = the end)."""
    with Vocabulary(gguf) as vocabulary:
        a, b = (vocabulary.answer_ids(text) for text in (expected, got))
        at = parting(a, b)
        return at, vocabulary.word(a, at), vocabulary.word(b, at)


def _template(served: Served, reference: Reference, rendered: str) -> str:
    with Vocabulary(served.gguf) as vocabulary:
        a, b = (vocabulary.ids(text) for text in (reference.rendered, rendered))
        at = parting(a, b)
        expected, got = vocabulary.word(a, at), vocabulary.word(b, at)
    got_turns, expected_turns = (
        sum(text.count(turn[0]) for turn in reference.turns) for text in (rendered, reference.rendered)
    )
    if got_turns > expected_turns:
        cause = "TEMPLATE renders what was said before, and the model was trained on single questions"
    elif got_turns < expected_turns:
        cause = "TEMPLATE leaves out what was said before"
    elif reference.turns and expected in served.serving.stop:
        cause = f"TEMPLATE writes no {expected!r} behind an answer, so that turns run together"
    else:
        cause = "the model's TEMPLATE or SYSTEM are not those of training"
    return (
        f"token {at} of the rendered prompt is {got!r}, expected {expected!r} (rendered {rendered!r}, training "
        f"had {reference.rendered!r}). Likely cause: template; {cause}"
    )


def _tokens(gguf: Path, reference: Reference, seen: Generation) -> str:
    if seen.prompt_ids is None and seen.rendered is None:
        return (
            f"{seen.prompt_tokens} tokens are read, expected {len(reference.ids)}. Likely cause: template or BOS; this "
            "server does not report how it renders prompts"
        )
    with Vocabulary(gguf) as vocabulary:
        ids = _read(vocabulary, seen, reference)
        at = parting(ids, reference.ids)
        if ids == reference.ids:
            return (
                f"{seen.prompt_tokens} tokens are read, expected {len(reference.ids)}; the exported file gives as many "
                "as training. Likely cause: the server cut the prompt (num_ctx), or left cached tokens out of its count"
            )
        cause = bos_cause(reference.ids, ids) or "tokenizer; the GGUF's is not the one of training"
        got, expected = vocabulary.word(ids, at), vocabulary.word(reference.ids, at)
    return (
        f"token {at} of the prompt is {got!r}, expected {expected!r} ({seen.prompt_tokens} tokens read, training had "
        f"{len(reference.ids)}). Likely cause: {cause}"
    )


def _read(vocabulary: Vocabulary, seen: Generation, reference: Reference) -> list[int]:
    """The tokens that the engine read; of one that only counts, the exported file's, a BOS more or less as counted."""
    if seen.prompt_ids is not None:
        return seen.prompt_ids
    ids = vocabulary.ids(seen.rendered or "", bos=True)
    more = (seen.prompt_tokens or 0) - len(ids)
    if abs(more) == 1 and ids == reference.ids:
        return [ids[0], *ids] if more == 1 else ids[1:]
    return ids


def _stop(case: Case, reference: Reference, seen: Generation) -> str | None:
    """Whether other stop words, or an end token that does not end, explain an answer; the engine is asked again."""
    trained = case.served.serving.stop
    if ask(case.engine, reference, trained).text == reference.answer:
        words = [w for w in case.engine.stop if reference.answer[len(seen.text) :].startswith(w)]
        cut = f"{words[0]!r} is a stop word on the server and inside of answers" if words else "stop words differ"
        return f"stop; {cut}: it has {list(case.engine.stop)}, training {trained}"
    with _local(case.engine, case.served) as local, Vocabulary(case.served.gguf) as vocabulary:
        answer = ask(local, reference).ids or []
        if seen.text.startswith(reference.answer):
            ends = {ids[0]: w for w in trained if len(ids := vocabulary.ids(w)) == 1}
            behind = next((ends[t] for t in answer if t in ends), None)
            return behind and f"stop; the answer goes on behind {behind!r}, which the GGUF does not mark as an end"
        ids, got = (vocabulary.answer_ids(text) for text in (reference.answer, seen.text))
        at = parting(ids, got)
        expected = vocabulary.word(ids, at)
        if at == len(got) < len(ids) and vocabulary.is_end(ids[at]) and expected not in trained:
            return f"stop; the GGUF marks {expected!r} as an end, and answers have it inside"
    return None


def _scale(case: Case) -> str | None:
    """Base and adapter at other scales, in this process: which of them answers as was seen, or as training did?"""
    form = case.served if case.served.adapter else case.served.adapter_form()
    if form is None or form.adapter is None:
        return None
    pairs = sorted(
        zip(case.references, case.seen, strict=True), key=lambda pair: pair[1].text == pair[0].answer
    )[:SCALE_PROMPTS]  # fmt: skip
    as_seen: dict[float, float] = {}
    as_trained: dict[float, float] = {}
    # Factors by which a scale gets lost: none at all, α/r, r/α, √r (rsLoRA), and powers of two.
    alpha, rank = scale_of(form.adapter)
    usual = [alpha / rank, rank / alpha, rank**0.5, rank**-0.5, alpha, 1 / alpha, 2, 0.5, 4, 0.25]
    for scale in [1.0, 0.0, *dict.fromkeys(round(s, 6) for s in usual if round(s, 6) not in (0.0, 1.0))]:
        with open_in_process(form, scale) as local:
            texts = [ask(local, reference).text for reference, _ in pairs]
        as_seen[scale] = sum(t == s.text for t, (_, s) in zip(texts, pairs, strict=True)) / len(pairs)
        as_trained[scale] = sum(t == r.answer for t, (r, _) in zip(texts, pairs, strict=True)) / len(pairs)
    if as_trained[1.0] >= SCALE_AGREES:
        best = max(as_seen, key=lambda s: as_seen[s])
        if best != 1.0 and as_seen[best] >= SCALE_AGREES and as_seen[best] > as_seen[1.0]:
            what = f"the adapter counts {best:.3g} times as much as trained" if best else "the adapter has no effect"
            return f"scale; {what} (with that factor llama.cpp gives {as_seen[best]:.0%} of these answers)"
        return None
    best = max(as_trained, key=lambda s: as_trained[s])
    if best != 1.0 and as_trained[best] >= SCALE_AGREES:
        return (
            f"scale; the adapter file answers as trained once its scale is multiplied by {best:.3g} "
            f"({as_trained[best]:.0%} of the prompts): α or rank went wrong on export"
        )
    return None


def _weights(case: Case, reference: Reference) -> str:
    if case.engine.precision not in _SIXTEEN_BITS:
        return f"quantization; the weights are {case.engine.precision}, training had 16 bits or more"
    if not isinstance(case.engine, LlamaCppEngine):
        with open_in_process(case.served) as local:
            if ask(local, reference).text == reference.answer:
                return "the server; llama.cpp answers from the same files as training did, and it is no tie"
    what = "weights of the adapter" if case.served.adapter else "merge or weights of the file"
    return f"{what}; template, BOS, stop words, scale and precision are as they should be"
