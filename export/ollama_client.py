"""Talking to an Ollama server: where it is, whether it answers, what it has."""

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from export.errors import ExportError

if TYPE_CHECKING:
    from ollama import Client

DEFAULT_PORT = 11434
PROBE_S = 2.0  # seconds to wait for a server before it counts as absent
CONNECT_S = 10.0  # to wait for a connection, seconds
ANSWER_S = 60.0  # longest silence, seconds, after a question for which the server needs no model
LOAD_S = 600.0  # and after one for which it may have to load a large model from a slow disk

GREEDY: dict[str, Any] = {
    "temperature": 0.0,
    "top_k": 1,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": 0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Options of a greedy answer. Penalties are named: the server's defaults, repeat_penalty 1.1 among them, change it."""


class OllamaError(ExportError):
    """The server refused, or made something else than it was asked for."""


class OllamaRefused(OllamaError):  # noqa: N818  (named as OllamaUnavailable is)
    """The server answered with an HTTP error.

    Attributes:
        status: HTTP status; -1 for an error that came in the middle of a stream.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class OllamaUnavailable(OllamaError):  # noqa: N818  (a state of the world, named as such)
    """No server answers, or the connection broke."""


def resolve_host(host: str | None = None) -> str:
    """The server's URL, by the rules of the `ollama` client.

    Args:
        host: "host", ":port", "host:port" or a URL; None reads OLLAMA_HOST, then falls back to
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
    """Options of every httpx call: a proxy of the environment never stands before this machine itself."""
    loopback = urlsplit(url).hostname in {"127.0.0.1", "localhost", "::1", "0.0.0.0"}  # noqa: S104
    return {"trust_env": not loopback, "verify": _certificates()}


def open_client(host: str | None = None, timeout_s: float | None = None) -> "Client":
    """An `ollama.Client` to be closed by the caller.

    Args:
        host: As in `resolve_host`.
        timeout_s: Longest silence of the server, seconds; None waits for ever.
    """
    import httpx
    from ollama import Client

    url = resolve_host(host)
    timeout = httpx.Timeout(timeout_s, connect=CONNECT_S)
    return Client(url, timeout=timeout, **http_options(url))


@contextmanager
def explained(url: str, timeout_s: float | None = None) -> Iterator[None]:
    """Turns what the client raises into errors that name the server and say what to do.

    Raises:
        OllamaUnavailable: no connection, or it broke.
        OllamaRefused: the server answered with an error.
    """
    import httpx
    from ollama import ResponseError

    try:
        yield
    except ResponseError as error:
        hint = ""
        if "adapters are no longer supported" in error.error:
            hint = "; releases from 0.34.1 on take no LoRA adapters: register the merged GGUF without one"
        said = f"Ollama at {url} answered {error.status_code}: {error.error}{hint}"
        raise OllamaRefused(said, error.status_code) from error
    except httpx.TimeoutException as error:
        raise OllamaUnavailable(
            f"Ollama at {url} said nothing for {timeout_s} s; see its log, or raise the time allowed"
        ) from error
    except (ConnectionError, httpx.TransportError) as error:
        raise OllamaUnavailable(
            f"the connection to Ollama at {url} failed ({type(error).__name__}: {error}); start it with "
            "`ollama serve`, or set OLLAMA_HOST to where it runs"
        ) from error


@contextmanager
def connect(host: str | None = None, timeout_s: float | None = None) -> Iterator["Client"]:
    """`open_client`, closed on exit, with `explained` errors."""
    with explained(resolve_host(host), timeout_s), open_client(host, timeout_s) as client:
        yield client


def server_version(host: str | None = None) -> str | None:
    """The server's version; None when nothing answers within 2 s.

    Raises:
        OllamaError: something answers there that is not Ollama.
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
        raise OllamaError(
            f"expected an Ollama server at {url}, but /api/version answered {answer.status_code}: {answer.text[:100]!r}"
        ) from error


def full_name(name: str) -> str:
    """The name under which the server lists a model: with its tag."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def list_models(host: str | None = None) -> dict[str, str]:
    """Every model of the server: full name with tag → digest.

    Raises:
        OllamaUnavailable, OllamaError: the server cannot be asked, or answers with something else than such a list.
    """
    url = resolve_host(host)
    with connect(url, ANSWER_S) as client:
        try:
            rows = client.list().models
        except ValueError as error:
            raise OllamaError(
                f"expected the list of models from Ollama at {url}, got something else: {str(error)[:200]}; see its log"
            ) from error
    found = {}
    for row in rows:
        if not row.model or not row.digest:
            raise OllamaError(
                f"expected name and digest of every model from Ollama at {url}, got name {row.model!r} with digest "
                f"{row.digest!r}; upgrade the server"
            )
        found[row.model] = row.digest
    return found


def remove(host: str | None, name: str) -> bool:
    """Deletes a model from the server; False when it had none of that name.

    Raises:
        OllamaUnavailable, OllamaError: the server cannot be asked, or refused.
    """
    if full_name(name) not in list_models(host):
        return False
    try:
        with connect(host, ANSWER_S) as client:
            client.delete(name)
    except OllamaRefused as error:
        if error.status == 404:  # someone else was faster
            return False
        raise
    return True


def show_model(host: str | None, name: str) -> dict[str, Any]:
    """The answer of /api/show; the `ollama` client leaves out the system message.

    Raises:
        OllamaUnavailable, OllamaError: the server cannot be asked, or has no such model.
    """
    return _post(resolve_host(host), "/api/show", {"model": name}, ANSWER_S)


def render_prompt(host: str | None, name: str, prompt: str) -> str | None:
    """What the server makes of a user's prompt with the model's template; None where the release does not tell.

    Raises:
        OllamaUnavailable, OllamaError: the server cannot be asked, or has no such model.
    """
    # A release that does not know _debug_render_only answers the prompt: with one token, then.
    body = {
        "model": name,
        "prompt": prompt,
        "stream": False,
        "_debug_render_only": True,
        "options": {"num_predict": 1},
    }
    content = _post(resolve_host(host), "/api/generate", body, LOAD_S)
    if "_debug_info" not in content:
        return None
    try:
        return str(content["_debug_info"]["rendered_template"])
    except (KeyError, TypeError) as error:
        raise OllamaError(
            f"expected _debug_info.rendered_template from Ollama at {resolve_host(host)} for {name!r}, got "
            f"{str(content['_debug_info'])[:200]}; see its log"
        ) from error


def _post(url: str, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    import httpx

    with explained(url, timeout_s):
        answer = httpx.post(f"{url}{path}", json=body, timeout=timeout_s, **http_options(url))
    if answer.is_error:
        said = f"Ollama at {url} answered {answer.status_code} to {path}: {answer.text[:200]}"
        raise OllamaRefused(said, answer.status_code)
    try:
        content = answer.json()
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise OllamaError(f"expected a JSON object from {path} of Ollama at {url}, got {answer.text[:100]!r}")
    return content
