"""Greedy answers from an Ollama server, which applies the model's own TEMPLATE to the prompt."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from evaluation.backends import BackendError, Generation
from export.ollama_client import (
    OllamaError,
    explained,
    full_name,
    list_models,
    open_client,
    resolve_host,
    server_version,
)

TIMEOUT_S = 600.0  # longest silence: a cold load of a large model from a slow disk takes minutes


class OllamaBackend:
    """One model on one server, one request at a time.

    Args:
        host: As in `export.ollama.resolve_host`; None reads OLLAMA_HOST.
        model: Name under which the model is registered.
        num_ctx: Context, tokens.
        num_threads: CPU threads; None leaves it to the server.
        expected: Item prompt → Hugging Face ids of the rendered prompt, BOS included. With it every request
            is checked: the server must have seen as many tokens.
        timeout_s: Longest silence of the server, seconds.

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
    ):
        self.host = resolve_host(host)
        self.model = model
        self._num_ctx = num_ctx
        self._num_threads = num_threads
        self._expected = expected
        self._timeout_s = timeout_s
        self._device: str | None = None
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
        self._client = open_client(self.host, timeout_s)

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
        ids = None if self._expected is None else len(self._expected(item_prompt))
        if ids is not None and ids + max_tokens > self._num_ctx:
            raise BackendError(
                f"expected prompt and answer within num_ctx {self._num_ctx}, got {ids} + {max_tokens} "
                "tokens; Ollama would cut the prompt and say nothing. Raise num_ctx"
            )
        answer = self._ask(prompt=item_prompt, options=self._options(max_tokens, stop))
        if not answer.done or answer.done_reason not in ("stop", "length"):
            raise BackendError(
                f"expected Ollama at {self.host} to end with 'stop' or 'length', got {answer.done_reason!r}"
            )
        # The server leaves out fields that are zero.
        seen = answer.prompt_eval_count or 0
        if ids is not None and seen != ids:
            raise BackendError(self._count_message(seen, ids))
        return Generation(
            text=answer.response or "",
            prompt_tokens=seen,
            answer_tokens=answer.eval_count or 0,
            load_ns=answer.load_duration or 0,
            prefill_ns=answer.prompt_eval_duration or 0,
            decode_ns=answer.eval_duration or 0,
            finish_reason=answer.done_reason,
        )

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
        # Penalties are named: the server's defaults, repeat_penalty 1.1 among them, change greedy answers.
        options: dict[str, Any] = {
            "temperature": 0.0,
            "top_k": 1,
            "top_p": 1.0,
            "min_p": 0.0,
            "seed": 0,
            "repeat_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "num_predict": max_tokens,
            "num_ctx": self._num_ctx,
        }
        if self._num_threads is not None:
            options["num_thread"] = self._num_threads
        if stop:
            options["stop"] = list(stop)
        return options

    def _ask(self, prompt: str, options: dict[str, Any]) -> Any:
        try:
            with explained(self.host, self._timeout_s):
                return self._client.generate(self.model, prompt, options=options, stream=False)
        except OllamaError as error:
            raise BackendError(f"{error} (model {self.model!r})") from error

    def _resident(self) -> Any | None:
        try:
            with explained(self.host, self._timeout_s):
                running = self._client.ps().models
        except OllamaError as error:
            raise BackendError(str(error)) from error
        return next((m for m in running if full_name(self.model) in (m.model, m.name)), None)

    def close(self) -> None:
        """Closes the connection; the server unloads the model on its own."""
        self._client.close()

    def __enter__(self) -> "OllamaBackend":
        """The backend itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()
