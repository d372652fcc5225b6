"""A double of the Ollama server (0.32), for tests that must not depend on one being installed.

It speaks HTTP on an ephemeral loopback port and answers as the real server does, its oddities included:
creating stores the weights under another digest than the file's, /api/create checks no parameter, a wrong
type in `options` is a 500 while an unknown option is ignored, and fields that are zero are left out. A prompt
(/api/generate) and a conversation (/api/chat, /v1/chat/completions) are rendered alike, with the model's system
message in front where there is none. Texts come from llama.cpp on the uploaded GGUF, or from a callable for tests
that have none.
"""

import hashlib
import json
import math
import random
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from export.engines.engine import conversation, cut, messages_of
from export.engines.llama_cpp import LlamaCppEngine
from export.go import render_go

LOAD_COLD_NS, LOAD_WARM_NS = 260_000_000, 1_000_000

INTS = {"num_ctx", "num_predict", "num_thread", "num_keep", "num_batch", "top_k", "seed", "repeat_last_n"}
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "num_predict": -1, "num_ctx": 4096, "repeat_penalty": 1.1}
OPENAI = {"max_tokens": "num_predict", **{k: k for k in ("temperature", "top_p", "seed", "stop")}}
TOLD = ("done_reason", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration")


class SamplingEngine(LlamaCppEngine):
    """Greedy, unless the options of a request say otherwise."""

    options: dict[str, Any] = DEFAULTS

    def next_token(self) -> int:
        heat, most = self.options["temperature"], self.options["top_k"]
        if heat <= 0 or most == 1:
            return super().next_token()
        logits = self.logits()
        best = logits.argsort()[::-1][: most if most > 0 else None]
        return int(random.choices(best, [math.exp((logits[t] - logits[best[0]]) / heat) for t in best])[0])


class Refusal(Exception):  # noqa: N818
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


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


@dataclass
class OllamaDouble:
    """A server to use in a `with` block.

    `reply`: rendered prompt → answer; None runs llama.cpp on the uploaded GGUF. `tokenize`: text → token ids, with
    `reply` only; BOS and one token per UTF-8 byte by default. From `version` 0.34.1 on adapters are refused, as the
    real one does. `times` is how many generations `misbehave` goes on; `size_vram` the bytes on the GPU, answer of
    /api/ps.

    `misbehave` may be set at any time. Of a generation: "die" breaks off and is gone, "hang" never answers, "drop"
    closes the connection, "wrong_template" renders a BOS too many, "error_500_n_times", "wrong_json",
    "missing_response", "not_done" (a 200 with something else than a finished answer), "missing_fields" (an older
    release, without counts, times and reasons). Of a creation: "no_success", "break_create" end early, the latter
    within the stream, "forget_settings" stores no parameters.
    """

    reply: Callable[[str], str] | None = None
    tokenize: Callable[[str], list[int]] = lambda text: [1, *text.encode()]
    version: str = "0.32.0"
    misbehave: str | None = None
    size_vram: int = 0
    times: float = math.inf
    requests: list[tuple[str, str, Any]] = field(default_factory=list)  # method, path, JSON body or number of bytes
    blobs: dict[str, Path] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    loaded: dict[str, str] = field(default_factory=dict)  # model name → digest under which it was loaded

    def __post_init__(self) -> None:
        self.gone = threading.Event()
        self.lock = threading.Lock()  # one generation at a time, as OLLAMA_NUM_PARALLEL=1
        self._engines: dict[tuple, Any] = {}
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

    def put_blob(self, digest: str, data: bytes) -> None:
        assert f"sha256:{hashlib.sha256(data).hexdigest()}" == digest
        path = Path(self._store.name) / digest.replace(":", "-")
        beside = path.with_name(f"{path.name}.{threading.get_ident()}")  # whoever reads meanwhile sees a whole file
        beside.write_bytes(data)
        self.blobs[digest] = beside.replace(path)

    def create(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The statuses of a creation; the refusals that come before any status are raised at once."""
        if body.get("adapters") and tuple(map(int, self.version.split("."))) >= (0, 34, 1):
            raise Refusal(400, "LoRA adapters are no longer supported")
        gguf, adapter = (next(map(self.blobs.get, (body.get(k) or {}).values()), None) for k in ("files", "adapters"))
        assert gguf is not None
        return self._create(body, gguf, adapter)

    def _create(self, body: dict[str, Any], gguf: Path, adapter: Path | None) -> Iterator[dict[str, Any]]:
        stored = hashlib.sha256(b"rewritten" + gguf.read_bytes()).hexdigest()
        yield {"status": f"creating new layer sha256:{stored}"}
        if self.misbehave in ("no_success", "break_create"):
            return
        parameters = {} if self.misbehave == "forget_settings" else body.get("parameters") or {}
        model = Model(gguf, adapter, stored, "", body["template"], body.get("system") or "", parameters)
        layers = [stored, adapter and adapter.name, model.template, model.system, body.get("license"), model.parameters]
        model.digest = hashlib.sha256(json.dumps(layers, sort_keys=True).encode()).hexdigest()
        self.models[full_name(body["model"])] = model
        yield {"status": "success"}

    def model(self, body: dict[str, Any]) -> Model:
        if full_name(body["model"]) not in self.models:
            raise Refusal(404, f"model '{body['model']}' not found")
        return self.models[full_name(body["model"])]

    def delete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.model(body)
        del self.models[full_name(body["model"])]
        return {}

    def listing(self, names: Iterable[str], **more: Any) -> dict[str, Any]:
        rows = []
        for name in names:
            model = self.models[name]
            known = {"digest": model.digest, "size": model.gguf.stat().st_size}
            rows.append({"name": name, "model": name, **known, **more})
        return {"models": rows}

    def running(self) -> dict[str, Any]:
        return self.listing([name for name in list(self.loaded) if name in self.models], size_vram=self.size_vram)

    def show(self, body: dict[str, Any]) -> dict[str, Any]:
        model = self.model(body)
        lines = []
        for key, value in model.parameters.items():
            for one in value if isinstance(value, list) else [value]:
                # Go prints 0.0 as 0 and quotes texts.
                text = json.dumps(one, ensure_ascii=False) if isinstance(one, str) else f"{one:g}"
                lines.append(f"{key:<30} {text}")
        adapter = f"ADAPTER /models/blobs/{model.adapter.name}\n" if model.adapter else ""
        modelfile = f"FROM /models/blobs/sha256-{model.stored}\n{adapter}TEMPLATE {model.template}\n"
        system = {"system": model.system} if model.system else {}
        return {
            "template": model.template,
            **system,
            "parameters": "\n".join(lines),
            "modelfile": modelfile,
            "model_info": {},
        }

    def strike(self, body: dict[str, Any]) -> str | None:
        with self.lock:
            if not (body.get("prompt") or body.get("messages")) or self.misbehave is None or self.times <= 0:
                return None
            self.times -= 1
            return self.misbehave

    # --- generation ---------------------------------------------------------------------------------------

    def generate(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Text fragments, then the final message with its timings; of a conversation, too."""
        model, name = self.model(body), full_name(body["model"])
        options = {**DEFAULTS, **model.parameters, **(body.get("options") or {})}
        for key in INTS & options.keys():
            if not isinstance(options[key], int | float):
                raise Refusal(500, f'option "{key}" must be of type integer')
            options[key] = int(options[key])
        asked = body.get("prompt") or body.get("messages")
        if not asked and body.get("keep_alive") == 0:
            self.loaded.pop(name, None)
            yield {"model": body["model"], "response": "", "done": True, "done_reason": "unload"}
            return
        load_ns = LOAD_WARM_NS if self.loaded.get(name) == model.digest else LOAD_COLD_NS
        self.loaded[name] = model.digest
        base = {"model": body["model"], "created_at": "2026-01-01T00:00:00Z"}
        if not asked:
            yield {**base, "response": "", "done": True, "done_reason": "load"}
            return
        messages = messages_of(asked)
        if model.system and messages[0]["role"] != "system":
            messages = [*conversation("", model.system)[:1], *messages]
        rendered = asked if body.get("raw") else render_go(model.template, messages)
        rendered = "<s>" * (self.misbehave == "wrong_template") + rendered
        if body.get("_debug_render_only"):
            yield {**base, "response": "", "done": False, "_debug_info": {"rendered_template": rendered}}
            return
        by = self._by_llama if self.reply is None else self._by_reply
        text, *told = by(model, rendered, options)
        for piece in re.findall(r".{1,4}", text, re.DOTALL):
            yield {**base, "response": piece, "done": False}
        known = {"load_duration": load_ns, "total_duration": load_ns, **dict(zip(TOLD, told, strict=True))}
        yield {**base, "response": "", "done": True, **{k: v for k, v in known.items() if v}}

    def _by_reply(self, model: Model, rendered: str, options: dict[str, Any]) -> tuple[Any, ...]:
        """Text and what is TOLD; a byte of the answer counts as one token, and so does its end."""
        assert self.reply is not None
        prompt = self.tokenize(rendered)[-options["num_ctx"] :]  # the real one cuts, too, and says nothing
        data, reason = cut(self.reply(rendered), options.get("stop") or []).encode(), "stop"
        if 0 <= options["num_predict"] < len(data):
            data, reason = data[: options["num_predict"]], "length"
        count = len(data) + (reason == "stop")
        return data.decode(errors="ignore"), reason, len(prompt), 1000 * len(prompt), count, 5000 * count

    def _by_llama(self, model: Model, rendered: str, options: dict[str, Any]) -> tuple[Any, ...]:
        room = options["num_ctx"]
        key = (model.gguf, model.adapter, room)
        if key not in self._engines:
            self._engines[key] = SamplingEngine(model.gguf, "{prompt}", num_ctx=room, adapter=model.adapter, threads=1)
        engine = self._engines[key]
        engine.options = options
        prompt = engine.tokenize(rendered)[-room:]
        limit = min(options["num_predict"] if options["num_predict"] >= 0 else room, room - len(prompt))
        made = engine.answer(prompt, limit, options.get("stop") or ())
        counts = made.prompt_tokens, made.prefill_ns, made.answer_tokens, made.decode_ns
        return made.text, made.finish_reason, *counts

    def chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for part in self.generate(body):
            text = part.pop("response")
            yield {**part, "message": {"role": "assistant", "content": text}}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """/v1/chat/completions. What a request leaves out is not the model's own temperature, but OpenAI's."""
        said = {OPENAI[key]: value for key, value in body.items() if key in OPENAI}
        parts = list(self.generate({**body, "options": {"temperature": 1.0, "top_p": 1.0, **said}}))
        last, text = parts[-1], "".join(part["response"] for part in parts)
        read, made = (last.get(key, 0) for key in ("prompt_eval_count", "eval_count"))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": last["done_reason"]}
        usage = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
        return {"object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}


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

    def do_HEAD(self) -> None:
        self.double.requests.append(("HEAD", self.path, None))
        self._send(b"", 200 if self.path.removeprefix("/api/blobs/") in self.double.blobs else 404)

    def do_GET(self) -> None:
        double = self.double
        if double.gone.is_set():  # a kept connection must not outlive the server
            return self._hang_up()
        data, _, blob = self._body(), *self.path.partition("/api/blobs/")[1:]
        routes: dict[str, Callable[[Any], dict[str, Any]]] = {
            "/api/version": lambda _: {"version": double.version},
            "/api/tags": lambda _: double.listing(double.models),
            "/api/ps": lambda _: double.running(),
            "/api/show": lambda body: double.show(body),
            "/api/delete": double.delete,
            "/v1/chat/completions": double.complete,
        }
        body = len(data) if blob else json.loads(data or b"{}")
        double.requests.append((self.command, self.path, body))
        try:
            if blob:
                double.put_blob(blob, data)
                self._send(b"", 201)
            elif self.path == "/api/create":
                self._stream(double.create(body), ends=double.misbehave != "break_create")
            elif self.path in ("/api/generate", "/api/chat"):
                self._generate(body, double.generate if self.path == "/api/generate" else double.chat)
            elif self.path in routes:
                self._json(routes[self.path](body))
            else:
                raise Refusal(404, "404 page not found")
        except Refusal as refusal:
            self._json({"error": str(refusal)}, refusal.status)

    do_POST = do_DELETE = do_GET  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status)

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

    def _generate(self, body: Any, answer: Callable[[Any], Iterator[dict[str, Any]]]) -> None:
        how = self.double.strike(body)
        if how in ("die", "hang", "drop"):
            return self._fail(how)
        if how == "error_500_n_times":
            raise Refusal(500, "llama runner process has terminated: exit status 2")
        with self.double.lock:
            parts = list(answer(body))
        if how in ODD_ANSWERS:
            return self._send(ODD_ANSWERS[how])
        if how == "missing_fields":
            parts[-1] = {k: v for k, v in parts[-1].items() if k in ("model", "response", "message", "done")}
        if body.get("stream", True):
            self._stream(iter(parts))
        else:
            whole = "".join(p["response"] if "response" in p else p["message"]["content"] for p in parts)
            said = (
                {"message": {"role": "assistant", "content": whole}} if "message" in parts[-1] else {"response": whole}
            )
            self._json({**parts[-1], **said})

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
