"""Whether an export is the model that was trained: token ids and greedy answers, prompt by prompt."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Engine(Protocol):
    """What parity needs of a backend."""

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


def compare(
    engines: Mapping[str, Engine], prompts: Sequence[str], max_tokens: int, *, reference: str
) -> dict[str, Any]:
    """Hold every engine against one of them.

    Args:
        engines: Name → engine; all run the same model.
        prompts: Rendered prompts.
        max_tokens: Greedy tokens compared for each prompt.
        reference: Name of the engine that is taken as right.

    Returns:
        prompts, token_ids_equal and greedy_equal (shares, the worst pair), pairs and
        token_id_pairs (each pair's shares), and first_difference (None where there is none): engine, kind,
        prompt, position, both tokens and the likely cause. Greedy answers are asked for with the reference's ids,
        so that a tokenizer's fault is counted once.
    """
    others = [name for name in engines if name != reference]
    same_ids = dict.fromkeys(others, 0)
    same_text = dict.fromkeys(others, 0)
    first: dict[str, Any] | None = None
    base = engines[reference]
    for number, prompt in enumerate(prompts):
        ids = base.tokenize(prompt)
        answer = base.greedy(ids, max_tokens)
        for name in others:
            engine = engines[name]
            for kind, right, got, counter in (
                ("token_ids", ids, engine.tokenize(prompt), same_ids),
                ("greedy", answer, engine.greedy(ids, max_tokens), same_text),
            ):
                at = _first_difference(right, got)
                if at is None:
                    counter[name] += 1
                elif first is None:
                    first = {
                        "engine": name,
                        "kind": kind,
                        "prompt_number": number,
                        "prompt": prompt,
                        "position": at,
                        "expected_token": right[at] if at < len(right) else None,
                        "got_token": got[at] if at < len(got) else None,
                        "expected_text": base.detokenize(right),
                        "got_text": base.detokenize(got),
                        "likely_cause": _cause(kind, right, got, at),
                    }
    n = len(prompts)
    return {
        "prompts": n,
        "max_tokens": max_tokens,
        "reference": reference,
        "token_ids_equal": min(same_ids.values()) / n,
        "greedy_equal": min(same_text.values()) / n,
        "pairs": {f"{reference}/{name}": same_text[name] / n for name in others},
        "token_id_pairs": {f"{reference}/{name}": same_ids[name] / n for name in others},
        "first_difference": first,
    }


def verdict(result: Mapping[str, Any], min_greedy_equal: float) -> str | None:
    """Why an export must not be used, or None when it may."""
    problems = []
    if result["token_ids_equal"] < 1.0:
        problems.append(f"token ids are equal for {result['token_ids_equal']:.1%} of prompts, expected 100%")
    if result["greedy_equal"] < min_greedy_equal:
        problems.append(
            f"greedy answers are equal for {result['greedy_equal']:.1%} of prompts, expected {min_greedy_equal:.1%}"
        )
    if not problems:
        return None
    d = result["first_difference"]
    return (
        f"{'; '.join(problems)}. First difference: {d['engine']}, {d['kind']}, prompt {d['prompt_number']}, position "
        f"{d['position']}: expected token {d['expected_token']}, got {d['got_token']} "
        f"({d['expected_text']!r} against {d['got_text']!r}). Likely cause: {d['likely_cause']}"
    )
