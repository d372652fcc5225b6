"""Whether an export is the model that was trained: token ids and greedy answers, prompt by prompt.

Merging rounds weights to 16 bit and engines add in different orders, so logits differ a little; llama.cpp also rounds
what goes into a product with 16-bit weights, and keys and values, to 16 bit. Where the reference's best two tokens are
closer than that, either may come out. Such ties are counted and named, so that a difference can be understood; they
count as differences all the same.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any

from export.engines.engine import Generation, LocalEngine

# Logits. The lead of the best token over the second differed by at most 0.022 between Hugging Face (float32, adapter
# not merged) and the two f16 GGUF forms, over 1017 tokens of the tiny profile (LOG.md, 2026-11-21).
TIE = 0.025


def parting(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Position of the first element in which two sequences differ; the shorter one's length where none does."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def compare(
    engines: Mapping[str, Callable[[], LocalEngine]], prompts: Sequence[str], max_tokens: int, *, reference: str
) -> dict[str, Any]:
    """Hold every engine against the one named `reference`. Only one is open at a time: memory need not hold two models.

    `prompts` are rendered. token_ids_equal and greedy_equal are shares, of the worst pair; greedy_tied is the share of
    prompts that part at a tie, of the worst pair; pairs, token_id_pairs and tied_pairs each pair's shares. Greedy
    answers are asked for with the reference's ids, so that a tokenizer's fault is counted once. The first of the others
    is asked before the reference, which then only looks whether it would say the same.
    """
    first = next(name for name in engines if name != reference)
    guessed = _ask(engines[first], prompts, max_tokens)
    ids, right, texts = _ask(engines[reference], prompts, max_tokens, map(_ids, guessed[1]))
    greedy_pairs: dict[str, float] = {}
    id_pairs: dict[str, float] = {}
    tied: dict[str, float] = {}
    differences: list[tuple[int, dict[str, Any]]] = []
    for name, opened in engines.items():
        if name == reference:
            continue
        pair = f"{reference}/{name}"
        known = guessed if name == first and guessed[0] == ids else None
        own_ids, got, said = known or _ask(opened, prompts, max_tokens, given=ids)
        for kind, expected, came, shares in (
            ("token_ids", ids, own_ids, id_pairs),
            ("greedy", [_ids(g) for g in right], [_ids(g) for g in got], greedy_pairs),
        ):
            parted = [None if a == b else parting(a, b) for a, b in zip(expected, came, strict=True)]
            leads = [_lead(g, p) if kind == "greedy" else None for g, p in zip(right, parted, strict=True)]
            ties = [lead is not None and lead < TIE for lead in leads]
            shares[pair] = parted.count(None) / len(prompts)
            if kind == "greedy":
                tied[pair] = sum(ties) / len(prompts)
            number = next((i for i, p in enumerate(parted) if p is not None), None)
            if number is None or (at := parted[number]) is None:
                continue
            a, b = expected[number], came[number]
            found = {
                "engine": name,
                "kind": kind,
                "prompt_number": number,
                "prompt": prompts[number],
                "position": at,
                "expected_token": a[at] if at < len(a) else None,
                "got_token": b[at] if at < len(b) else None,
                "expected_text": texts[tuple(a)],
                "got_text": said[tuple(b)],
                "gap": leads[number],
                "likely_cause": ("rounding: the best two tokens are a tie" if ties[number] else _cause(kind, a, b, at)),
            }
            differences.append((number, found))
    return {
        "prompts": len(prompts),
        "max_tokens": max_tokens,
        "reference": reference,
        "token_ids_equal": min(id_pairs.values()),
        "greedy_equal": min(greedy_pairs.values()),
        "greedy_tied": max(tied.values()),
        "tied_pairs": tied,
        "pairs": greedy_pairs,
        "token_id_pairs": id_pairs,
        "answers": {
            prompt: {"ids": x, "answer": texts[tuple(_ids(made))]}
            for prompt, x, made in zip(prompts, ids, right, strict=True)
        },
        "first_difference": min(differences, key=lambda d: d[0])[1] if differences else None,
    }


def _ask(
    opened: Callable[[], LocalEngine],
    prompts: Sequence[str],
    max_tokens: int,
    guesses: Iterable[Sequence[int]] = repeat(()),
    given: Sequence[list[int]] | None = None,
) -> tuple[list[list[int]], list[Generation], dict[tuple[int, ...], str]]:
    """An engine's own ids of prompts; its answers to these or to `given`; the text of all."""
    with opened() as engine:
        ids = [list(engine.tokenize(prompt)) for prompt in prompts]
        made = [engine.answer(x, max_tokens, guess=guess) for x, guess in zip(given or ids, guesses, strict=False)]
        return ids, made, {tuple(x): engine.detokenize(x) for x in [*ids, *map(_ids, made)]}


def _ids(made: Generation) -> list[int]:
    return made.ids or []


def _lead(made: Generation, position: int | None) -> float | None:
    leads = made.leads or []
    return leads[position] if position is not None and position < len(leads) else None


def _cause(kind: str, reference: Sequence[int], other: Sequence[int], at: int) -> str:
    if kind == "token_ids":
        if at == 0 and list(other[1:]) == list(reference):
            return "BOS: the export puts a token in front that training did not"
        if at == 0 and list(reference[1:]) == list(other):
            return "BOS: the export leaves out the first token that training had"
        return "tokenizer or template"
    if at == len(reference) or at == len(other):
        return "end of sequence: one side stops where the other goes on"
    return "adapter scale, merge or quantization"


def problem(result: Mapping[str, Any], min_greedy_equal: float) -> str | None:
    """Why an export must not be used, or None when it may."""
    problems = []
    if result["token_ids_equal"] < 1.0:
        problems.append(f"token ids are equal for {result['token_ids_equal']:.1%} of prompts, expected 100%")
    if result["greedy_equal"] < min_greedy_equal:
        problems.append(
            f"greedy answers are equal for {result['greedy_equal']:.1%} of prompts, expected {min_greedy_equal:.1%} "
            f"({result['greedy_tied']:.1%} part at a tie, where rounding decides)"
        )
    if not problems:
        return None
    d = result["first_difference"]
    return (
        f"{'; '.join(problems)}. First difference: {d['engine']}, {d['kind']}, prompt {d['prompt_number']}, position "
        f"{d['position']}: expected token {d['expected_token']}, got {d['got_token']} "
        f"({d['expected_text']!r} against {d['got_text']!r}). Likely cause: {d['likely_cause']}"
    )
