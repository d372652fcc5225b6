"""What every backend answers: one prompt in, one timed generation out, or many prompts at once.

Times are integer nanoseconds and cover one phase each, since load, prefill and decode scale differently: load
is per process, prefill per prompt token, decode per answer token. None: not measured, or not said by the server.
"""

from collections.abc import Iterator, Sequence
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
        prefill_ns: Evaluating the prompt, ns. A prompt cache shortens it without lowering `prompt_tokens`. None where
            several sequences shared the passes.
        decode_ns: Decoding the answer, ns; None as for `prefill_ns`.
        finish_reason: "stop" (end token or stop word) or "length" (the token limit).
    """

    text: str
    prompt_tokens: int | None
    answer_tokens: int | None
    load_ns: int | None
    prefill_ns: int | None
    decode_ns: int | None
    finish_reason: str | None


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

    @property
    def mode(self) -> str:
        """What the weights are: "merged", or "adapter" beside the base's."""

    def generate(self, item_prompt: str, max_tokens: int, stop: Sequence[str]) -> Generation:
        """The greedy answer to one item.

        Args:
            item_prompt: The user's text, before any template.
            max_tokens: Limit of the answer, tokens, ≥ 1.
            stop: Words that end the answer.

        Raises:
            BackendError: no answer, or one that must not be scored.
        """

    def generate_many(
        self, item_prompts: Sequence[str], max_tokens: int, stop: Sequence[str]
    ) -> Iterator[tuple[int, Generation]]:
        """The greedy answers to many items, several at once where the backend was told so.

        Args:
            item_prompts: The users' texts, before any template.
            max_tokens: Limit of each answer, tokens, ≥ 1.
            stop: Words that end an answer.

        Yields:
            Place in `item_prompts` and answer, each place once, in the order in which they are finished. Beside
            others an answer is the same up to rounding: it differs where two tokens are all but equally likely.

        Raises:
            BackendError: no answer, or one that must not be scored; what was yielded before stands.
        """

    def close(self) -> None:
        """Releases the model; may be called twice."""
