"""What verification asks of an engine, be it llama.cpp in this process or an Ollama server.

A backend opens models; an open model answers one prompt at a time, greedily, in the form in which it is served.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from export.serving import Served


@dataclass(frozen=True)
class Reference:
    """What Hugging Face says to one prompt.

    Attributes:
        prompt: The user's text.
        rendered: With the training template.
        ids: Tokens of `rendered`, BOS included where training had one.
        answer: Greedy text, without the end token.
        max_tokens: Limit of the answer.
    """

    prompt: str
    rendered: str
    ids: list[int]
    answer: str
    max_tokens: int


@dataclass(frozen=True)
class Seen:
    """What an engine makes of one prompt.

    Attributes:
        rendered: The prompt within the model's own template; None where the server does not tell.
        tokens: Number of tokens read, BOS included; None where the server does not tell.
        ids: Those tokens; None where the engine only counts them (Ollama).
        text: Greedy answer, cut at the stop word, `as_decoded`.
        answer_ids: Its tokens; None where the engine does not give them (Ollama).
        leads: Logit of the best token minus that of the second, for each of them and for the end if it came by itself;
            None where the engine does not give them.
    """

    rendered: str | None
    tokens: int | None
    ids: list[int] | None
    text: str
    answer_ids: list[int] | None
    leads: list[float] | None


def as_decoded(text: str, answer: str) -> str:
    """An engine's answer as Hugging Face would have decoded it.

    SentencePiece's decoder drops the blank of the first token; llama.cpp and Ollama give it, since for them a prompt
    stands in front. Other tokenizers keep it on both sides, so it goes only where the rest then fits better.

    Args:
        text: Of the engine.
        answer: Of Hugging Face.
    """
    bare = text.removeprefix(" ")
    return bare if parting(bare, answer) > parting(text, answer) else text


def parting(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Position of the first element in which two sequences differ; the shorter one's length where none does."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Engine(Protocol):
    """One open model.

    Attributes:
        stop: The stop words with which it is served.
        precision: Type of most of its weights, e.g. "F16" or "Q4_K_M"; None where that is not known.
        server_digest: The server's digest of the model; None without a server.
        stored_sha256: Hash of the weights as the server keeps them; None where it does not say.
        differences: Settings that the server stored otherwise than they were exported; None where there are none.
        note: What must be known of the model that is asked, e.g. that it is a temporary copy.
    """

    stop: tuple[str, ...]
    precision: str | None
    server_digest: str | None
    stored_sha256: str | None
    differences: str | None
    note: str | None

    def ask(self, reference: Reference, stop: Sequence[str] | None = None) -> Seen:
        """The answer to one prompt; `stop`: other stop words than those it is served with."""
        ...


class Backend(Protocol):
    """Opens models.

    Attributes:
        name: llama_cpp or ollama.
        version: Of the library or the server.
    """

    name: str
    version: str

    def open(self, served: Served, scale: float = 1.0) -> AbstractContextManager[Engine]:
        """The model in its mode; `scale`: factor on the adapter's own scale, for controls."""
        ...
