"""What every backend answers: one prompt in, one timed generation out.

Times are integer nanoseconds and cover one phase each, since load, prefill and decode scale differently: load
is per process, prefill per prompt token, decode per answer token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class BackendError(RuntimeError):
    """A backend could not answer, or answered something that must not be scored."""


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: The answer, without the stop word that ended it.
        prompt_tokens: Tokens of the rendered prompt, BOS included.
        answer_tokens: Tokens decoded.
        load_ns: Loading the model, ns; near 0 when it was resident.
        prefill_ns: Evaluating the prompt, ns. A prompt cache shortens it without lowering `prompt_tokens`.
        decode_ns: Decoding the answer, ns.
        finish_reason: "stop" (end token or stop word) or "length" (the token limit).
    """

    text: str
    prompt_tokens: int
    answer_tokens: int
    load_ns: int
    prefill_ns: int
    decode_ns: int
    finish_reason: str


class Backend(Protocol):
    """A way to run a model greedily."""

    @property
    def name(self) -> str:
        """Short name, e.g. "ollama"."""

    @property
    def version(self) -> str:
        """Version of the engine: scores move between releases on the same weights."""

    @property
    def device_class(self) -> str:
        """Where the weights lie: "cpu", "gpu" or "cpu+gpu"."""

    def generate(self, item_prompt: str, max_tokens: int, stop: Sequence[str]) -> Generation:
        """The greedy answer to one item.

        Args:
            item_prompt: The user's text, before any template.
            max_tokens: Limit of the answer, tokens, ≥ 1.
            stop: Words that end the answer.

        Raises:
            BackendError: no answer, or one that must not be scored.
        """

    def close(self) -> None:
        """Releases the model; may be called twice."""
