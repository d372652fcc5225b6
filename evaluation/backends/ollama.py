"""Greedy answers from an Ollama server, which applies the model's own TEMPLATE to the prompt."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from evaluation.backends import BackendError, Generation
from evaluation.backends.ollama_link import Link
from evaluation.backends.retry import PassingError, Retry
from evaluation.backends.threads import as_finished
from export.ollama_client import GREEDY, OllamaError, full_name, list_models, resolve_host, server_version

TIMEOUT_S = 600.0  # longest silence: a cold load of a large model from a slow disk takes minutes
UNLOAD_S = 30.0  # time that a server gets to unload a model


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class OllamaBackend:
    """One model on one server.

    Failures that may pass are asked again: 5xx, timeouts, broken connections, answers that are not the JSON expected.
    What the server refuses (4xx) is not, but for one thing: a model that is gone is registered once more.

    Args:
        host: As in `export.ollama.resolve_host`; None reads OLLAMA_HOST.
        model: Name under which the model is registered.
        num_ctx: Context, tokens.
        num_threads: CPU threads; None leaves it to the server.
        expected: Item prompt → Hugging Face ids of the rendered prompt, BOS included. With it every request
            is checked: the server must have seen as many tokens.
        timeout_s: Longest silence of the server, seconds.
        parallel: Requests in flight in `generate_many`; how many of them the server works on at once is its own
            OLLAMA_NUM_PARALLEL.
        retry: How often and how long to ask again.
        restore: Registers the model anew; called when the server says that it has it no more.
        mode: How the server has the model: "merged", or "adapter" on a shared base.
        say: Called with a line for each further try and for each figure that the server leaves out.

    Attributes:
        mode: As given.
        missing: Figures that this server left out, e.g. {"prompt_eval_count"}; they are None in the answers.

    Raises:
        BackendError: no server, or it does not have the model.
    """

    name = "ollama"

    def __init__(
        self,
        host: str | None,
        model: str,
        num_ctx: int,
        num_threads: int | None = None,
        expected: Callable[[str], list[int]] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        parallel: int = 1,
        retry: Retry | None = None,
        restore: Callable[[], object] | None = None,
        mode: str = "merged",
        say: Callable[[str], None] = _to_stderr,
    ):
        self.host = resolve_host(host)
        self.model = model
        self.mode = mode
        self._num_ctx = num_ctx
        self._num_threads = num_threads
        self._expected = expected
        self._device: str | None = None
        self._parallel = parallel
        self._say = say
        self._lock = threading.Lock()
        self.missing: set[str] = set()
        try:
            version = server_version(self.host)
            if version is None:
                raise BackendError(
                    f"no Ollama answers at {self.host}; start it with `ollama serve`, set OLLAMA_HOST, or "
                    "choose another backend"
                )
            known = list_models(self.host)
        except OllamaError as error:
            raise BackendError(str(error)) from error
        if full_name(model) not in known:
            have = ", ".join(sorted(known)) or "none"
            raise BackendError(
                f"Ollama at {self.host} has no model {model!r} (it has: {have}); run the export stage with this host"
            )
        self.version = version
        self._link = Link(self.host, model, timeout_s, retry or Retry(), restore, say)

    @property
    def device_class(self) -> str:
        """Where the server holds the weights: "cpu", "gpu" or "cpu+gpu". Loads the model if need be."""
        if self._device is None:
            running = self._resident()
            if running is None:
                # An empty prompt loads and generates nothing.
                self._ask(prompt="", options=self._options(1, ()))
                running = self._resident()
            if running is None:
                raise BackendError(f"Ollama at {self.host} did not keep {self.model!r} loaded; see its log")
            size, in_vram = int(running.size or 0), int(running.size_vram or 0)
            self._device = "cpu" if in_vram == 0 else "gpu" if in_vram >= size else "cpu+gpu"
        return self._device

    def generate(self, item_prompt: str, max_tokens: int, stop: Sequence[str]) -> Generation:
        """The greedy answer to one item.

        Args:
            item_prompt: The user's text, before the template.
            max_tokens: Limit of the answer, tokens, ≥ 1.
            stop: Words that end the answer; empty means those the model was registered with.

        Raises:
            BackendError: the connection broke, the server refused, or it saw another number of tokens than
                Hugging Face's tokenizer gives.
        """
        if not item_prompt or max_tokens < 1:
            raise BackendError(
                f"expected a prompt and max_tokens ≥ 1, got {item_prompt!r} and {max_tokens}; Ollama would "
                "load the model and answer nothing"
            )
        ids = self._fitting(item_prompt, max_tokens)
        answer = self._ask(prompt=item_prompt, options=self._options(max_tokens, stop))
        self._given(answer, "done_reason")
        if answer.done_reason not in ("stop", "length", None):
            raise BackendError(
                f"expected Ollama at {self.host} to end with 'stop' or 'length', got {answer.done_reason!r}"
            )
        seen = self._seen(answer, ids)
        # The server leaves out fields that are zero, and decoding nothing counts nothing and takes no time.
        nothing = answer.response == "" and answer.eval_count is None
        return Generation(
            text=answer.response,
            prompt_tokens=seen,
            answer_tokens=0 if nothing else self._given(answer, "eval_count"),
            load_ns=self._given(answer, "load_duration"),
            prefill_ns=self._given(answer, "prompt_eval_duration"),
            decode_ns=0 if nothing else self._given(answer, "eval_duration"),
            finish_reason=answer.done_reason,
        )

    def generate_many(
        self, item_prompts: Sequence[str], max_tokens: int, stop: Sequence[str]
    ) -> Iterator[tuple[int, Generation]]:
        """See `evaluation.backends.Backend`; here as many requests in flight."""
        return as_finished(lambda prompt: self.generate(prompt, max_tokens, stop), item_prompts, self._parallel)

    def timed(self, prompt: str, tokens: int) -> dict[str, tuple[int | None, int | None]]:
        """One streamed request, timed.

        Args:
            prompt: The user's text, before the template.
            tokens: Decoded at most; the server stops earlier where the model ends its answer.

        Returns:
            Phase → (tokens, ns): prefill and decode by the server's own figures; ttft by this machine's clock, from
            sending the request to the first piece of text, less the time in which the server loaded the model; None
            where it does not say how long that was.

        Raises:
            BackendError: as `generate`.
        """
        ids = self._fitting(prompt, tokens)

        def stream(client: Any) -> tuple[Any, int, bool]:
            started, first, part, text = time.perf_counter_ns(), None, None, False
            for part in client.generate(self.model, prompt, options=self._options(tokens, ()), stream=True):
                text |= bool(part.response)
                if first is None and (part.response or part.done):
                    first = time.perf_counter_ns() - started
            return part, first or 0, text

        last, first, text = self._link.call(stream, lambda made: self._finished(made[0]))
        seen, load = self._seen(last, ids), self._given(last, "load_duration")
        nothing = not text and last.eval_count is None  # as in `generate`
        return {
            "ttft": (1, None if load is None else first - load),
            "prefill": (seen, self._given(last, "prompt_eval_duration")),
            "decode": (0, 0) if nothing else (self._given(last, "eval_count"), self._given(last, "eval_duration")),
        }

    def _fitting(self, prompt: str, max_tokens: int) -> int | None:
        """Tokens of the rendered prompt, where the tokenizer is known.

        Raises:
            BackendError: with the answer they do not fit the context.
        """
        if self._expected is None:
            return None
        with self._lock:  # tokenizers in Rust refuse two threads at once
            ids = len(self._expected(prompt))
        if ids + max_tokens > self._num_ctx:
            raise BackendError(
                f"expected prompt and answer within num_ctx {self._num_ctx}, got {ids} + {max_tokens} "
                "tokens; Ollama would cut the prompt and say nothing. Raise num_ctx"
            )
        return ids

    def _seen(self, answer: Any, ids: int | None) -> int | None:
        """Prompt tokens that the server saw.

        Raises:
            BackendError: other than expected.
        """
        seen: int | None = self._given(answer, "prompt_eval_count")
        if ids is not None and seen is not None and seen != ids:
            raise BackendError(self._count_message(seen, ids))
        return seen

    def load_cold(self) -> int | None:
        """Time that the server takes to load the model after unloading it, ns by its own figure.

        Raises:
            BackendError: as `generate`, or the server does not let go of the model.
        """
        self._ask(prompt="", options=self._options(1, ()), keep_alive=0)
        given_up = time.monotonic() + UNLOAD_S
        while self._resident() is not None:
            if time.monotonic() > given_up:
                raise BackendError(
                    f"Ollama at {self.host} still holds {self.model!r} {UNLOAD_S:.0f} s after it was told to unload "
                    "it; does somebody else use it? Loading cannot be timed then"
                )
            time.sleep(0.05)
        # With an empty prompt the server would load the model, too, but not say how long that took.
        ns: int | None = self._given(self._ask(prompt="x", options=self._options(1, ())), "load_duration")
        return ns

    def _given(self, answer: Any, name: str) -> Any:
        """A figure of the server's; None, said once, where it leaves it out."""
        value = getattr(answer, name)
        if value is None and name not in self.missing:
            self.missing.add(name)
            self._say(f"Ollama {self.version} at {self.host} gives no {name}; it is recorded as unknown")
        return value

    def _count_message(self, seen: int, ids: int) -> str:
        causes = "BOS or the template differ between training and serving"
        if seen == ids + 1:
            causes += " (one more: BOS comes twice, or the server adds one that training did not have)"
        elif seen == ids - 1:
            causes += " (one less: training had a BOS that the GGUF does not add)"
        elif seen < ids:
            causes += "; releases from 0.30.0 to the fix of ollama#16428 left out cached tokens here, then upgrade"
        return (
            f"Ollama {self.version} at {self.host} read {seen} prompt tokens for {self.model!r}, expected "
            f"{ids}: {causes}. Compare export.ollama.render_prompt with the training template"
        )

    def _options(self, max_tokens: int, stop: Sequence[str]) -> dict[str, Any]:
        options: dict[str, Any] = {**GREEDY, "num_predict": max_tokens, "num_ctx": self._num_ctx}
        if self._num_threads is not None:
            options["num_thread"] = self._num_threads
        if stop:
            options["stop"] = list(stop)
        return options

    def _ask(self, prompt: str, options: dict[str, Any], keep_alive: float | None = None) -> Any:
        return self._link.call(
            lambda client: client.generate(self.model, prompt, options=options, stream=False, keep_alive=keep_alive),
            self._finished,
        )

    def _finished(self, answer: Any) -> None:
        if answer is None or not answer.done or answer.response is None:
            raise PassingError(
                f"expected a finished answer from Ollama at {self.host}, got one without 'response' or not 'done': "
                f"{str(answer)[:200]}"
            )

    def _resident(self) -> Any | None:
        running = self._link.call(lambda client: client.ps().models)
        return next((m for m in running if full_name(self.model) in (m.model, m.name)), None)

    def close(self) -> None:
        """Closes the connection; the server unloads the model on its own."""
        self._link.close()

    def __enter__(self) -> "OllamaBackend":
        """The backend itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()
