"""A double of the Ollama server (0.32), for tests that must not depend on one being installed.

It speaks HTTP on an ephemeral loopback port and answers as the real server does, its oddities included:
creating stores the weights under another digest than the file's, /api/create checks no parameter, a wrong
type in `options` is a 500 while an unknown option is ignored, and fields that are zero are left out. Texts
come from llama.cpp on the uploaded GGUF, or from a callable for tests that have none.
"""

import hashlib
import json
import math
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from export.engines.llama_cpp import LlamaCppEngine
from export.template import evaluate

LOAD_COLD_NS, LOAD_WARM_NS = 260_000_000, 1_000_000

INTS = {"num_ctx", "num_predict", "num_thread", "num_keep", "num_batch", "top_k", "seed", "repeat_last_n"}
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "num_predict": -1, "num_ctx": 4096, "repeat_penalty": 1.1}


class Refusal(Exception):  # noqa: N818
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def cut(text: str, stop: list[str], otherwise: str = "stop") -> tuple[str, str]:
    found = [at for word in stop if (at := text.find(word)) >= 0]
    return (text[: min(found)], "stop") if found else (text, otherwise)


def check_types(options: dict[str, Any]) -> None:
    for key in INTS & options.keys():
        if not isinstance(options[key], int | float):
            raise Refusal(500, f'option "{key}" must be of type integer')
        options[key] = int(options[key])


def by_reply(
    reply: Callable[[str], str], tokenize: Callable[[str], list[int]], rendered: str, options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Text and final message from a callable; a byte of the answer counts as one token."""
    prompt = tokenize(rendered)[-options["num_ctx"] :]  # the real one cuts, too, and says nothing
    text, reason = cut(reply(rendered), options.get("stop") or [])
    data = text.encode()
    if 0 <= options["num_predict"] < len(data):
        data, reason = data[: options["num_predict"]], "length"
    return data.decode(errors="ignore"), {
        "done_reason": reason,
        "prompt_eval_count": len(prompt),
        "prompt_eval_duration": 1000 * len(prompt),
        "eval_count": len(data),
        "eval_duration": 5000 * len(data),
    }


def by_llama(engine: LlamaCppEngine, rendered: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Text and final message from llama.cpp, greedy whatever the options say."""
    prompt = engine.tokenize(rendered)[-options["num_ctx"] :]
    limit = options["num_predict"] if options["num_predict"] >= 0 else options["num_ctx"]
    made = engine.answer(prompt, min(limit, options["num_ctx"] - len(prompt)), options.get("stop") or ())
    by_token = made.finish_reason == "stop" and len(made.leads or []) > (made.answer_tokens or 0)
    return made.text, {
        "done_reason": made.finish_reason,
        "prompt_eval_count": made.prompt_tokens,
        "prompt_eval_duration": made.prefill_ns,
        "eval_count": (made.answer_tokens or 0) + by_token,  # the end token counts, as in the real one
        "eval_duration": made.decode_ns,
    }


def full_name(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


@dataclass
class Model:
    gguf: Path
    adapter: Path | None
    stored: str  # digest of the weights as stored
    digest: str  # of the whole model
    template: str
    system: str
    parameters: dict[str, Any]


class OllamaDouble:
    """A server to use in a `with` block.

    `reply`: rendered prompt → answer; None runs llama.cpp on the uploaded GGUF. `tokenize`: text → token ids, with
    `reply` only; BOS and one token per UTF-8 byte by default. From `version` 0.34.1 on adapters are refused, as the
    real one does. `times` is how many generations `misbehave` goes on; `size_vram` the bytes on the GPU, answer of
    /api/ps.

    `misbehave` may be set at any time. Of a generation: "die" breaks off and is gone, "hang" never answers, "drop"
    closes the connection, "wrong_template" renders a BOS too many, "error_500_n_times", "wrong_json",
    "missing_response", "not_done" (a 200 with something else than a finished answer), "missing_fields" (an older
    release, without counts, times and reasons), "forget_model" deletes the model that is asked for. Of a creation:
    "no_success", "break_create" end early, the latter within the stream, "forget_settings" stores no parameters.
    "hang_all" answers nothing but HEAD; "bare_list" leaves out digests.
    """

    def __init__(
        self,
        reply: Callable[[str], str] | None = None,
        *,
        tokenize: Callable[[str], list[int]] | None = None,
        version: str = "0.32.0",
        misbehave: str | None = None,
        size_vram: int = 0,
        times: float = math.inf,
    ):
        self.reply = reply
        self.tokenize = tokenize or (lambda text: [1, *text.encode()])
        self.version = version
        self.misbehave = misbehave
        self.times = times
        self.size_vram = size_vram
        self.requests: list[tuple[str, str, Any]] = []  # method, path, decoded JSON body or number of bytes
        self.blobs: dict[str, Path] = {}
        self.models: dict[str, Model] = {}
        self.loaded: dict[str, str] = {}  # model name -> digest under which it was loaded
        self.gone = threading.Event()
        self._engines: dict[tuple, Any] = {}
        self.lock = threading.Lock()  # one generation at a time, as OLLAMA_NUM_PARALLEL=1
        self._store = tempfile.TemporaryDirectory(prefix="ollama-double-")

    def __enter__(self) -> "OllamaDouble":
        handler = type("BoundHandler", (Handler,), {"double": self})
        self._server = Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()
        self._thread.join(10)
        for engine in self._engines.values():
            engine.close()
        self._store.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def die(self) -> None:
        if not self.gone.is_set():
            self.gone.set()
            self._server.shutdown()
            self._server.server_close()

    # --- blobs and models ---------------------------------------------------------------------------------

    def put_blob(self, digest: str, data: bytes) -> int:
        came = f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert came == digest.replace("-", ":")
        known = came in self.blobs
        path = Path(self._store.name) / came.replace(":", "-")
        beside = path.with_name(f"{path.name}.{threading.get_ident()}")  # whoever reads meanwhile sees a whole file
        beside.write_bytes(data)
        beside.replace(path)
        self.blobs[came] = path
        return 200 if known else 201

    def _blob(self, files: dict[str, str]) -> Path | None:
        return next((self.blobs[digest] for digest in files.values()), None)

    def create(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The statuses of a creation; the refusals that come before any status are raised at once."""
        if body.get("adapters") and tuple(map(int, self.version.split("."))) >= (0, 34, 1):
            raise Refusal(400, "LoRA adapters are no longer supported")
        gguf, adapter = self._blob(body["files"]), self._blob(body.get("adapters") or {})
        assert gguf is not None
        return self._create(body, gguf, adapter)

    def _create(self, body: dict[str, Any], gguf: Path, adapter: Path | None) -> Iterator[dict[str, Any]]:
        yield {"status": "parsing GGUF"}
        stored = hashlib.sha256(b"rewritten" + gguf.read_bytes()).hexdigest()
        yield {"status": f"creating new layer sha256:{stored}"}
        if self.misbehave in ("no_success", "break_create"):
            return
        model = Model(
            gguf,
            adapter,
            stored,
            "",
            body.get("template") or "{{ .Prompt }}",
            body.get("system") or "",
            {} if self.misbehave == "forget_settings" else body.get("parameters") or {},
        )
        layers = [stored, adapter and adapter.name, model.template, model.system, body.get("license"), model.parameters]
        model.digest = hashlib.sha256(json.dumps(layers, sort_keys=True).encode()).hexdigest()
        yield {"status": "writing manifest"}
        self.models[full_name(body["model"])] = model
        yield {"status": "success"}

    def model(self, body: dict[str, Any]) -> Model:
        name = body.get("model") or body.get("name") or ""
        if full_name(name) not in self.models:
            raise Refusal(404, f"model '{name}' not found")
        return self.models[full_name(name)]

    def listing(self, names: Iterable[str], **more: Any) -> dict[str, Any]:
        rows = []
        for name in names:
            model = self.models[name]
            size = model.gguf.stat().st_size
            digest = {} if self.misbehave == "bare_list" else {"digest": model.digest}
            rows.append({"name": name, "model": name, **digest, "size": size, "details": {}, **more})
        return {"models": rows}

    def show(self, body: dict[str, Any]) -> dict[str, Any]:
        model = self.model(body)
        lines = []
        for key, value in model.parameters.items():
            for one in value if isinstance(value, list) else [value]:
                # Go prints 0.0 as 0 and quotes texts.
                text = json.dumps(one, ensure_ascii=False) if isinstance(one, str) else f"{one:g}"
                lines.append(f"{key:<30} {text}")
        return {
            "template": model.template,
            **({"system": model.system} if model.system else {}),
            "parameters": "\n".join(lines),
            "modelfile": f"FROM /models/blobs/sha256-{model.stored}\n"
            + (f"ADAPTER /models/blobs/{model.adapter.name}\n" if model.adapter else "")
            + f"TEMPLATE {model.template}\n",
        }

    def strike(self, body: dict[str, Any]) -> str | None:
        with self.lock:
            if not body.get("prompt") or self.misbehave is None or self.times <= 0:
                return None
            self.times -= 1
            return self.misbehave

    # --- generation ---------------------------------------------------------------------------------------

    def generate(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Text fragments, then the final message with its timings."""
        model, name = self.model(body), full_name(body["model"])
        options = {**DEFAULTS, **model.parameters, **(body.get("options") or {})}
        check_types(options)
        if not body.get("prompt") and body.get("keep_alive") == 0:
            self.loaded.pop(name, None)
            yield {"model": body["model"], "response": "", "done": True, "done_reason": "unload"}
            return
        load_ns = LOAD_WARM_NS if self.loaded.get(name) == model.digest else LOAD_COLD_NS
        self.loaded[name] = model.digest
        base = {"model": body["model"], "created_at": "2026-01-01T00:00:00Z"}
        if not body.get("prompt"):
            yield {**base, "response": "", "done": True, "done_reason": "load"}
            return
        rendered = self._render(model, body["prompt"])
        if body.get("_debug_render_only"):
            yield {**base, "response": "", "done": False, "_debug_info": {"rendered_template": rendered}}
            return
        if self.reply is not None:
            text, final = by_reply(self.reply, self.tokenize, rendered, options)
        else:
            key = (model.gguf, model.adapter, options["num_ctx"])
            if key not in self._engines:
                kept = {"adapter": model.adapter, "threads": 2, "keeps_leads": True}
                self._engines[key] = LlamaCppEngine(model.gguf, "{prompt}", num_ctx=options["num_ctx"], **kept)
            text, final = by_llama(self._engines[key], rendered, options)
        for piece in re.findall(r".{1,4}", text, re.DOTALL):
            yield {**base, "response": piece, "done": False}
        final = {"total_duration": load_ns + final["prompt_eval_duration"] + final["eval_duration"], **final}
        known = {k: v for k, v in {**final, "load_duration": load_ns}.items() if v}
        yield {**base, "response": "", "done": True, **known}

    def _render(self, model: Model, prompt: str) -> str:
        rendered = evaluate(model.template, system=model.system, prompt=prompt)
        return ("<s>" if self.misbehave == "wrong_template" else "") + rendered


# --- HTTP -----------------------------------------------------------------------------------------------------------

ODD_ANSWERS = {
    "wrong_json": b'{"model": "m", "response": "126", "do',
    "missing_response": b'{"model": "m", "done": true, "done_reason": "stop", "eval_count": 3}',
    "not_done": b'{"model": "m", "response": "12", "done": false}',
}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    double: "OllamaDouble"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body go out apart; a delayed ACK between them costs 40 ms

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        double = self.double
        answers = {
            "/api/version": lambda: {"version": double.version},
            "/api/tags": lambda: double.listing(double.models),
            "/api/ps": lambda: double.listing(
                [n for n in list(double.loaded) if n in double.models], size_vram=double.size_vram
            ),
        }
        self._answer({path: lambda _, answer=answer: self._json(answer()) for path, answer in answers.items()})

    def do_HEAD(self) -> None:
        known = self.path.removeprefix("/api/blobs/").replace("-", ":") in self.double.blobs
        self.double.requests.append(("HEAD", self.path, None))
        self._send(200 if known else 404, b"")

    def do_POST(self) -> None:
        if self.path.startswith("/api/blobs/"):
            self._answer({self.path: self._put_blob})
        else:
            show = lambda body: self._json(self.double.show(body))  # noqa: E731
            self._answer({"/api/create": self._create, "/api/show": show, "/api/generate": self._generate})

    def do_DELETE(self) -> None:
        self._answer({"/api/delete": self._delete})

    def _answer(self, routes: dict[str, Callable[[Any], None]]) -> None:
        if self.double.gone.is_set():  # a kept connection must not outlive the server
            self._hang_up()
            return
        data = self._body()
        if self.double.misbehave == "hang_all":
            self._fail("hang")
            return
        is_blob = self.path.startswith("/api/blobs/")
        try:
            body = len(data) if is_blob else json.loads(data or b"{}")
            self.double.requests.append((self.command, self.path, body))
            if self.path not in routes:
                raise Refusal(404, "404 page not found")
            routes[self.path](data if is_blob else body)
        except Refusal as refusal:
            self._json({"error": str(refusal)}, refusal.status)
        except ValueError as error:
            self._json({"error": str(error)}, 400)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, data: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())

    def _stream(self, parts: Iterator[dict[str, Any]], ends: bool = True) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in parts:
            line = json.dumps(part).encode() + b"\n"
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        if ends:
            self.wfile.write(b"0\r\n\r\n")
        else:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # --- routes -------------------------------------------------------------------------------------------

    def _put_blob(self, data: bytes) -> None:
        self._send(self.double.put_blob(self.path.removeprefix("/api/blobs/"), data), b"")

    def _delete(self, body: Any) -> None:
        self.double.model(body)
        del self.double.models[full_name(body.get("model") or body["name"])]
        self._send(200, b"")

    def _create(self, body: Any) -> None:
        statuses = self.double.create(body)
        if body.get("stream", True):
            self._stream(statuses, ends=self.double.misbehave != "break_create")
        else:
            self._json(list(statuses)[-1])

    def _generate(self, body: Any) -> None:
        how = self.double.strike(body)
        if how in ("die", "hang", "drop"):
            self._fail(how)
            return
        if how == "error_500_n_times":
            raise Refusal(500, "llama runner process has terminated: exit status 2")
        if how == "forget_model":
            self.double.models.pop(full_name(body["model"]), None)
        with self.double.lock:
            parts = list(self.double.generate(body))
        if how in ODD_ANSWERS:
            self._send(200, ODD_ANSWERS[how])
            return
        if how == "missing_fields":
            parts[-1] = {k: v for k, v in parts[-1].items() if k in ("model", "response", "done")}
        if body.get("stream", True):
            self._stream(iter(parts))
        else:
            self._json({**parts[-1], "response": "".join(p["response"] for p in parts)})

    def _fail(self, how: str) -> None:
        if how == "hang":
            self.double.gone.wait(60)
        elif how == "die":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"model": "half an ans')
        self._hang_up()
        if how == "die":
            self.double.die()
