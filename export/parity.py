"""Whether an export is the model that was trained: token ids and greedy answers, prompt by prompt.

Merging rounds weights to 16 bit and engines add in different orders, so logits differ a little; llama.cpp also rounds
what goes into a product with 16-bit weights, and keys and values, to 16 bit. Where the reference's best two tokens are
closer than that, either may come out. Such ties are counted and named, so that a difference can be understood; they
count as differences all the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# Logits. The lead of the best token over the second differed by at most 0.022 between Hugging Face (float32, adapter
# not merged) and the two f16 GGUF forms, over 1017 tokens of the tiny profile (LOG.md, 2026-11-21).
TIE = 0.025


class Engine(Protocol):
    """What parity needs of a backend."""

    gaps: list[float]

    def tokenize(self, text: str) -> list[int]:
        """Ids of a rendered prompt."""
        ...

    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy continuation, without the end token."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Position at which two sequences part, None when they are equal."""
    if list(a) == list(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _at(values: Sequence[float], position: int) -> float | None:
    return values[position] if position < len(values) else None


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


@dataclass(frozen=True)
class _Answers:
    """What one engine says: ids of each prompt, the greedy continuation of the reference's ids, and its leads."""

    ids: list[list[int]]
    greedy: list[list[int]]
    gaps: list[list[float]]


def _ask(engine: Engine, prompts: Sequence[str], max_tokens: int, given: Sequence[Sequence[int]] | None) -> _Answers:
    ids = [engine.tokenize(prompt) for prompt in prompts]
    greedy, gaps = [], []
    for x in given or ids:
        greedy.append(engine.greedy(x, max_tokens))
        gaps.append(list(engine.gaps))
    return _Answers(ids, greedy, gaps)


def compare(
    engines: Mapping[str, Callable[[], Engine]], prompts: Sequence[str], max_tokens: int, *, reference: str
) -> dict[str, Any]:
    """Hold every engine against one of them. Only one is open at a time: memory need not hold two models.

    Args:
        engines: Name → opens the engine; all run the same model.
        prompts: Rendered prompts.
        max_tokens: Greedy tokens compared for each prompt.
        reference: Name of the engine that is taken as right.

    Returns:
        prompts, token_ids_equal and greedy_equal (shares, the worst pair), greedy_tied (share of prompts that part at
        a tie, the worst pair), pairs, token_id_pairs and tied_pairs (each pair's shares), and first_difference (None
        where there is none): engine, kind, prompt, position, both tokens, the reference's lead there and the likely
        cause. answers: the reference's ids, and its greedy text, of every prompt. Greedy answers are asked for with the
        reference's ids, so that a tokenizer's fault is counted once.
    """
    base = engines[reference]()
    right = _ask(base, prompts, max_tokens, None)
    texts = {tuple(x): base.detokenize(x) for x in [*right.ids, *right.greedy]}
    base.close()
    pairs: dict[str, float] = {}
    id_pairs: dict[str, float] = {}
    tied: dict[str, float] = {}
    differences: list[tuple[int, dict[str, Any]]] = []
    for name, opened in engines.items():
        if name == reference:
            continue
        engine = opened()
        got = _ask(engine, prompts, max_tokens, right.ids)
        for kind, expected, came, shares in (
            ("token_ids", right.ids, got.ids, id_pairs),
            ("greedy", right.greedy, got.greedy, pairs),
        ):
            at = [_first_difference(a, b) for a, b in zip(expected, came, strict=True)]
            shares[f"{reference}/{name}"] = at.count(None) / len(prompts)
            if kind == "greedy":
                ties = [p is not None and p < len(g) and g[p] < TIE for p, g in zip(at, right.gaps, strict=True)]
                tied[f"{reference}/{name}"] = sum(ties) / len(prompts)
            number, position = next(((i, p) for i, p in enumerate(at) if p is not None), (-1, -1))
            if number >= 0:
                a, b = expected[number], came[number]
                gap = _at(right.gaps[number], position) if kind == "greedy" else None
                tie = gap is not None and gap < TIE
                found = {
                    "engine": name,
                    "kind": kind,
                    "prompt_number": number,
                    "prompt": prompts[number],
                    "position": position,
                    "expected_token": a[position] if position < len(a) else None,
                    "got_token": b[position] if position < len(b) else None,
                    "expected_text": texts[tuple(a)],
                    "got_text": engine.detokenize(b),
                    "gap": gap,
                    "likely_cause": "rounding: the best two tokens are a tie" if tie else _cause(kind, a, b, position),
                }
                differences.append((number, found))
        engine.close()
    return {
        "prompts": len(prompts),
        "max_tokens": max_tokens,
        "reference": reference,
        "token_ids_equal": min(id_pairs.values()),
        "greedy_equal": min(pairs.values()),
        "greedy_tied": max(tied.values()),
        "tied_pairs": tied,
        "pairs": pairs,
        "token_id_pairs": id_pairs,
        "answers": [
            {"ids": list(ids), "answer": texts[tuple(made)]} for ids, made in zip(right.ids, right.greedy, strict=True)
        ],
        "first_difference": min(differences, key=lambda d: d[0])[1] if differences else None,
    }


def verdict(result: Mapping[str, Any], min_greedy_equal: float) -> str | None:
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
