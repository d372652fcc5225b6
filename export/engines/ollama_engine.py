"""An Ollama server: where it is, what it has, and the engine that asks one of its models.

Failures that may be over in a moment are retried: 5xx, timeouts, broken connections, answers that are not the expected
JSON. Refusals (4xx) are not.
"""

import ast
import os
import random
import re
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from export import MergedOnlyError
from export.engines.engine import Asked, Engine, EngineError, Generation, Phases, Raw
from export.modelfile import Serving
from export.served import Mode

if TYPE_CHECKING:
    from ollama import Client

A = TypeVar("A")
B = TypeVar("B")

DEFAULT_PORT = 11434
PROBE_S = 2.0  # seconds to wait for a server before it counts as absent
CONNECT_S = 10.0  # to wait for a connection, seconds
ANSWER_S = 60.0  # longest silence, seconds, after a question for which the server needs no model
LOAD_S = 600.0  # and after one for which it may have to load a large model from a slow disk
UNLOAD_S = 30.0  # time that a server gets to unload a model
PASSING = (408, 429)
"""Refusals that pass: a proxy's time limit, and too many requests."""

GREEDY: dict[str, Any] = {
    "temperature": 0.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "seed": 0, "repeat_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip
"""Options of a greedy answer. Penalties are named: the server's defaults, repeat_penalty 1.1 among them, change it."""
DECIDES_ANSWERS = {*GREEDY, "num_predict", "repeat_last_n", "mirostat", "typical_p", "stop", "num_ctx"}


# --- the server -----------------------------------------------------------------------------------------------------


def resolve_host(host: str | None = None) -> str:
    """The server's URL, by the rules of the `ollama` client.

    `host` is "host", ":port", "host:port" or a URL; None reads OLLAMA_HOST, then falls back to
    http://127.0.0.1:11434. A URL without a port means 80 or 443.
    """
    text = host or os.environ.get("OLLAMA_HOST") or ""
    scheme, _, rest = text.partition("://")
    if not rest:
        scheme, rest = "http", text
    parts = urlsplit(f"{scheme}://{rest}")
    port = parts.port or ({"http": 80, "https": 443}.get(scheme, DEFAULT_PORT) if "://" in text else DEFAULT_PORT)
    name = parts.hostname or "127.0.0.1"
    name = f"[{name}]" if ":" in name else name
    path = parts.path.strip("/")
    return f"{scheme}://{name}:{port}" + (f"/{path}" if path else "")


@cache
def _certificates() -> ssl.SSLContext:
    """Reading the certificates takes 50 ms, and httpx would do it for every connection."""
    import httpx

    return httpx.create_ssl_context()


def http_options(url: str) -> dict[str, Any]:
    """Options of every httpx call: a proxy of the environment is never used for this machine itself."""
    loopback = urlsplit(url).hostname in {"127.0.0.1", "localhost", "::1", "0.0.0.0"}  # noqa: S104
    return {"trust_env": not loopback, "verify": _certificates()}


def _open_client(url: str, timeout_s: float) -> "Client":
    import httpx
    from ollama import Client

    return Client(url, timeout=httpx.Timeout(timeout_s, connect=CONNECT_S), **http_options(url))


@contextmanager
def _explained(url: str, timeout_s: float) -> Iterator[None]:
    """Turns what the client raises into errors that name the server and say what to do.

    Raises EngineError: no connection, a broken one, or an error from the server. MergedOnlyError: this release
    of Ollama takes no adapters.
    """
    import httpx
    from ollama import ResponseError

    try:
        yield
    except ResponseError as error:
        message = f"Ollama at {url} answered {error.status_code}: {error.error}"
        if "adapters are no longer supported" in error.error:
            hint = "releases from 0.34.1 on take no LoRA adapters: register the merged GGUF without one"
            raise MergedOnlyError(f"{message}; {hint}") from error
        raise _refusal(message, error.status_code) from error
    except httpx.TimeoutException as error:
        raise EngineError(
            f"Ollama at {url} said nothing for {timeout_s} s; see its log, or raise the time allowed",
            passing=True,
        ) from error
    except (ConnectionError, httpx.TransportError) as error:
        raise EngineError(
            f"the connection to Ollama at {url} failed ({type(error).__name__}: {error}); start it with "
            "`ollama serve`, or set OLLAMA_HOST to where it runs",
            passing=True,
        ) from error


def _refusal(message: str, status: int) -> EngineError:
    return EngineError(message, passing=not 400 <= status < 500 or status in PASSING)


@contextmanager
def connect(host: str | None, timeout_s: float) -> Iterator["Client"]:
    """An `ollama.Client` with errors that say what to do; the server may be silent for `timeout_s` seconds."""
    url = resolve_host(host)
    with _explained(url, timeout_s), _open_client(url, timeout_s) as client:
        yield client


def server_version(host: str | None = None) -> str | None:
    """The server's version; None when nothing answers within 2 s.

    Raises EngineError: something answers there that is not Ollama.
    """
    import httpx

    url = resolve_host(host)
    try:
        answer = httpx.get(f"{url}/api/version", timeout=PROBE_S, **http_options(url))
    except httpx.TransportError:
        return None
    try:
        return str(answer.raise_for_status().json()["version"])
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"expected an Ollama server at {url}, but /api/version answered {answer.status_code}: {answer.text[:100]!r}"
        ) from error


def require_server(host: str | None = None) -> str:
    """Its version. Raises EngineError: none answers."""
    version = server_version(host)
    if version is None:
        raise EngineError(
            f"no Ollama answers at {resolve_host(host)}; start it with `ollama serve`, or set OLLAMA_HOST",
            passing=True,
        )
    return version


def full_name(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def list_models(host: str | None = None) -> dict[str, str]:
    """Every model of the server: full name with tag → digest.

    Raises EngineError: the server cannot be asked, or answers with something else than such a list.
    """
    url = resolve_host(host)
    with connect(url, ANSWER_S) as client:
        try:
            rows = client.list().models
        except ValueError as error:
            raise EngineError(
                f"expected the list of models from Ollama at {url}, got something else: {str(error)[:200]}; see its log"
            ) from error
    return {row.model: row.digest for row in rows if row.model and row.digest}


def remove(host: str | None, name: str) -> bool:
    """Deletes a model from the server; False when it had none of that name."""
    if full_name(name) not in list_models(host):
        return False
    with connect(host, ANSWER_S) as client:
        client.delete(name)
    return True


@dataclass(frozen=True)
class Stored:
    """A model as the server has it; None is what it does not say."""

    digest: str  # of the whole model
    stored_sha256: str | None  # of its weights, which creating rewrites
    mode: Mode
    template: str
    system: str  # "" where there is none
    parameters: dict[str, list[object]]

    def differences(self, serving: Serving) -> list[str]:
        """Every setting stored differently from the export, and every added one that decides answers.

        Other parameters that a server adds by itself are ignored.
        """
        asked = {key: value if isinstance(value, list) else [value] for key, value in serving.parameters.items()}
        expected = {"template": serving.go_template, "system": serving.system or "", **asked}
        got: dict[str, Any] = {**self.parameters, "template": self.template, "system": self.system}
        added = {key: values for key, values in self.parameters.items() if key in DECIDES_ANSWERS - asked.keys()}
        return [
            *(f"{k}: expected {value!r}, got {got.get(k)!r}" for k, value in expected.items() if got.get(k) != value),
            *(f"{key}: expected none, got {values!r}" for key, values in added.items()),
        ]


def stored_model(host: str | None, name: str) -> Stored | None:
    """What the server has under a name; None when nothing. Raises EngineError: the server cannot be asked."""
    digest = list_models(host).get(full_name(name))
    if digest is None:
        return None
    # By hand, for the client leaves out the system message.
    content = _post(resolve_host(host), "/api/show", {"model": name}, ANSWER_S)
    modelfile = str(content.get("modelfile") or "")
    weights = re.search(r"^FROM .*sha256[-:]([0-9a-f]{64})", modelfile, re.MULTILINE)
    return Stored(
        digest,
        weights[1] if weights else None,
        "adapter" if re.search(r"^ADAPTER ", modelfile, re.MULTILINE) else "merged",
        str(content.get("template") or ""),
        str(content.get("system") or ""),
        parse_parameters(str(content.get("parameters") or "")),
    )


def parse_parameters(text: str) -> dict[str, list[object]]:
    """The `parameters` text of /api/show: name → values in order, numbers as numbers, texts unquoted."""
    parameters: dict[str, list[object]] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        try:
            parsed = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            parsed = value.strip()
        parameters.setdefault(name, []).append(parsed)
    return parameters


def render_asked(host: str | None, name: str, asked: Asked) -> str | None:
    """A prompt or a conversation in the model's template, as the server renders it; None: this release does not say.

    Raises EngineError: the server cannot be asked, or has no such model.
    """
    url = resolve_host(host)
    if isinstance(asked, Raw):
        return asked
    path, what = ("/api/generate", "prompt") if isinstance(asked, str) else ("/api/chat", "messages")
    body = {"model": name, what: asked, "stream": False, "_debug_render_only": True}
    # A release that does not know _debug_render_only answers: with one token, then.
    content = _post(url, path, {**body, "options": {"num_predict": 1}}, LOAD_S)
    rendered: str | None = (content.get("_debug_info") or {}).get("rendered_template")
    return rendered


def _post(url: str, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    import httpx

    with _explained(url, timeout_s):
        answer = httpx.post(f"{url}{path}", json=body, timeout=timeout_s, **http_options(url))
    if answer.is_error:
        message = f"Ollama at {url} answered {answer.status_code} to {path}: {answer.text[:200]}"
        raise _refusal(message, answer.status_code)
    try:
        content = answer.json()
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise EngineError(f"expected a JSON object from {path} of Ollama at {url}, got {answer.text[:100]!r}")
    return content


# --- the engine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retry:
    """Asking again, no later than `patience_s` after the first failure (0: never), with pauses that double.

    A request that ran into its own time limit is therefore tried twice, and a refusal at once many times.
    """

    patience_s: float = 60.0  # seconds, as the pauses
    first_s: float = 0.5
    longest_s: float = 15.0
    wait: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def call(self, ask: Callable[[], A], say: Callable[[str], None]) -> A:
        """What `ask` returns, asked again while its EngineError is `passing`; `say` gets one line before each pause.

        Raises EngineError: it failed for longer than `patience_s`, or in a way that does not pass.
        """
        began, tries = None, 0
        while True:
            try:
                return ask()
            except EngineError as error:
                if not error.passing:
                    raise
                now, tries = self.clock(), tries + 1
                began = now if began is None else began
                # Half of the pause is left to chance, so that several requests do not come back all at once.
                pause = min(self.longest_s, self.first_s * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
                if now + pause - began > self.patience_s:
                    message = f"{error} ({tries} tries in {now - began:.0f} s)" if tries > 1 else str(error)
                    raise EngineError(message) from error
                say(f"{error}; trying again in {pause:.1f} s")
                self.wait(pause)


class OllamaEngine(Engine):
    """One model on one server, which puts what is asked into the model's own TEMPLATE. Safe for several threads.

    With `expected` (what is asked → Hugging Face ids of it as rendered) every request is checked: the server must have
    seen as many tokens. `timeout_s` is its longest silence. `parallel` requests are in flight in `generate_many`; how
    many of them the server works on at once is its own OLLAMA_NUM_PARALLEL. `say` gets a line for each further try.
    Raises EngineError: no server, or it does not have the model.
    """

    name = "ollama"

    def __init__(
        self,
        host: str | None,
        model: str,
        num_ctx: int,
        expected: Callable[[Asked], list[int]] | None = None,
        *,
        timeout_s: float = LOAD_S,
        parallel: int = 1,
        retry: Retry | None = None,
        mode: str = "merged",
        stored: Stored | None = None,
        say: Callable[[str], None] | None = None,
    ):
        self.host, self.model, self.mode, self.stored = resolve_host(host), model, mode, stored
        if stored is not None:
            self.stop = tuple(str(word) for word in stored.parameters.get("stop", []))
        self._num_ctx, self._expected = num_ctx, expected
        self._timeout_s, self._parallel, self._retry = timeout_s, parallel, retry or Retry()
        self._say = say or (lambda line: print(line, file=sys.stderr))
        self._lock = threading.Lock()
        self._device: str | None = None
        self.version = require_server(self.host)
        known = list_models(self.host)
        if full_name(model) not in known:
            have = ", ".join(sorted(known)) or "none"
            raise EngineError(
                f"Ollama at {self.host} has no model {model!r} (it has: {have}); run the export stage with this host"
            )
        self._client = _open_client(self.host, timeout_s)

    @property
    def device_class(self) -> str:
        """Where the server holds the weights: "cpu", "gpu" or "cpu+gpu". Loads the model if need be."""
        if self._device is None:
            running = self._resident()
            if running is None:
                self._ask("", self._options(1))  # an empty prompt loads and generates nothing
                running = self._resident()
            if running is None:
                raise EngineError(f"Ollama at {self.host} did not keep {self.model!r} loaded; see its log")
            size, in_vram = int(running.size or 0), int(running.size_vram or 0)
            self._device = "cpu" if in_vram == 0 else "gpu" if in_vram >= size else "cpu+gpu"
        return self._device

    def render(self, asked: Asked) -> str | None:
        return render_asked(self.host, self.model, asked)

    def generate(self, asked: Asked, max_tokens: int, stop: Sequence[str] | None = None) -> Generation:
        """A text goes to /api/generate, a conversation to /api/chat. Without stop words the registered ones count.

        Raises EngineError: the connection broke, the server refused, or it saw another number of tokens than Hugging
        Face's tokenizer gives.
        """
        if not asked or max_tokens < 1:
            raise EngineError(
                f"expected a prompt and max_tokens ≥ 1, got {asked!r} and {max_tokens}; Ollama would "
                "load the model and answer nothing"
            )
        ids = self._fitting(asked, max_tokens)
        answer = self._ask(asked, self._options(max_tokens, stop))
        reason = answer.done_reason
        if reason not in ("stop", "length", None):
            raise EngineError(f"expected Ollama at {self.host} to end with 'stop' or 'length', got {reason!r}")
        times = answer.load_duration, answer.prompt_eval_duration, answer.eval_duration
        return Generation(str(_text(answer)), self._seen(answer, ids), answer.eval_count, *times, reason)

    def generate_many(
        self, prompts: Sequence[Asked], max_tokens: int, stop: Sequence[str] | None = None
    ) -> Iterator[tuple[int, Generation]]:
        return _as_finished(lambda asked: self.generate(asked, max_tokens, stop), prompts, self._parallel)

    def phases(self, prefix: str, prompt: str, tokens: int) -> Phases:
        """One streamed request, which the server ends earlier where the model ends its answer.

        Prefill and decode by the server's own figures; ttft by this machine's clock, from sending the request to the
        first piece of text, less the time of loading; None where the server does not say how long that was.
        """
        prompt = f"{prefix} {prompt}"
        ids = self._fitting(prompt, tokens)

        def stream(client: Any) -> tuple[Any, int]:
            started, first, part = time.perf_counter_ns(), None, None
            for part in client.generate(self.model, prompt, options=self._options(tokens), stream=True):
                if first is None and (part.response or part.done):
                    first = time.perf_counter_ns() - started
            return part, first or 0

        last, first = self._call(stream, lambda answer: self._finished(answer[0]))
        load = last.load_duration
        return {
            "ttft": (1, None if load is None else max(first - load, 0)),  # two clocks
            "prefill": (self._seen(last, ids), last.prompt_eval_duration),
            "decode": (last.eval_count, last.eval_duration),
        }

    def load_cold(self) -> int | None:
        """Time that the server takes to load the model after unloading it, ns by its own figure.

        Raises EngineError: as `generate`, or the server does not let go of the model.
        """
        self._ask("", self._options(1), keep_alive=0)
        given_up = time.monotonic() + UNLOAD_S
        while self._resident() is not None:
            if time.monotonic() > given_up:
                raise EngineError(
                    f"Ollama at {self.host} still holds {self.model!r} {UNLOAD_S:.0f} s after it was told to unload "
                    "it; is it in use elsewhere? Then loading cannot be timed"
                )
            time.sleep(0.05)
        # With an empty prompt the server would load the model, too, but not say how long that took.
        ns: int | None = self._ask("x", self._options(1)).load_duration
        return ns

    def _fitting(self, asked: Asked, max_tokens: int) -> int | None:
        """Tokens of what is asked, where the tokenizer is known; refused where they and the answer do not fit."""
        if self._expected is None:
            return None
        with self._lock:  # tokenizers in Rust refuse two threads at once
            ids = len(self._expected(asked))
        if ids + max_tokens > self._num_ctx:
            raise EngineError(
                f"expected prompt and answer within num_ctx {self._num_ctx}, got {ids} + {max_tokens} "
                "tokens; Ollama would cut the prompt and say nothing. Raise num_ctx"
            )
        return ids

    def _seen(self, answer: Any, ids: int | None) -> int | None:
        """Prompt tokens that the server saw; refused where they are others than expected."""
        seen: int | None = answer.prompt_eval_count
        if ids is None or seen is None or seen == ids:
            return seen
        causes = "BOS or the template differ between training and serving"
        if seen == ids + 1:
            causes += " (one more: BOS comes twice, or the server adds one that training did not have)"
        elif seen == ids - 1:
            causes += " (one less: training had a BOS that the GGUF does not add)"
        elif seen < ids:
            causes += "; releases from 0.30.0 to the fix of ollama#16428 left out cached tokens here, then upgrade"
        raise EngineError(
            f"Ollama {self.version} at {self.host} read {seen} prompt tokens for {self.model!r}, expected "
            f"{ids}: {causes}. Compare export.engines.ollama_engine.render_asked with the training template"
        )

    def _options(self, max_tokens: int, stop: Sequence[str] | None = None) -> dict[str, Any]:
        options: dict[str, Any] = {**GREEDY, "num_predict": max_tokens, "num_ctx": self._num_ctx}
        if stop:
            options["stop"] = list(stop)
        return options

    def _ask(self, asked: Asked, options: dict[str, Any], keep_alive: float | None = None) -> Any:
        def request(client: Any) -> Any:
            ask = client.generate if isinstance(asked, str) else client.chat
            raw = {"raw": True} if isinstance(asked, Raw) else {}
            return ask(self.model, asked, options=options, stream=False, keep_alive=keep_alive, **raw)

        return self._call(request, self._finished)

    def _finished(self, answer: Any) -> None:
        if answer is None or not answer.done or _text(answer) is None:
            raise EngineError(
                f"expected a finished answer from Ollama at {self.host}, got one without text or not 'done': "
                f"{str(answer)[:200]}",
                passing=True,
            )

    def _resident(self) -> Any | None:
        running = self._call(lambda client: client.ps().models)
        return next((m for m in running if full_name(self.model) in (m.model, m.name)), None)

    def _call(self, request: Callable[[Any], A], check: Callable[[A], None] = lambda answer: None) -> A:
        """What a request returns, repeated while its failure, or one that `check` finds in the answer, may pass.

        Raises EngineError: the server refused, or failed for too long.
        """
        return self._retry.call(lambda: self._try(request, check), self._say)

    def _try(self, request: Callable[[Any], A], check: Callable[[A], None]) -> A:
        try:
            with _explained(self.host, self._timeout_s):
                answer = request(self._client)
            check(answer)
            return answer
        except EngineError as error:
            raise EngineError(f"{error} (model {self.model!r})", passing=error.passing) from error
        except (ValueError, TypeError) as error:
            raise EngineError(
                f"expected the JSON of an answer from Ollama at {self.host}, got something else: {str(error)[:200]}",
                passing=True,
            ) from error

    def close(self) -> None:
        self._client.close()


def _text(answer: Any) -> str | None:
    """Of an answer to /api/generate, or to /api/chat."""
    text: str | None = answer.message.content if hasattr(answer, "message") else answer.response
    return text


def _as_finished(function: Callable[[A], B], inputs: Sequence[A], workers: int) -> Iterator[tuple[int, B]]:
    """(place in `inputs`, result) in the order in which they are finished.

    The first exception, or a caller that leaves the loop, ends it: no further input is begun.
    """
    with ThreadPoolExecutor(workers) as pool:
        places = {pool.submit(function, one): place for place, one in enumerate(inputs)}
        try:
            for future in as_completed(places):
                yield places[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
