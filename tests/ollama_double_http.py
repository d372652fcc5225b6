"""The HTTP side of `tests.ollama_double`."""

import json
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from tests.ollama_double_engine import Refusal

if TYPE_CHECKING:
    from tests.ollama_double import OllamaDouble

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
        self._answer({"/api/version": self._version, "/api/tags": self._tags, "/api/ps": self._ps})

    def do_HEAD(self) -> None:
        known = self.path.removeprefix("/api/blobs/").replace("-", ":") in self.double.blobs
        self.double.requests.append(("HEAD", self.path, None))
        self._send(200 if known else 404, b"")

    def do_POST(self) -> None:
        if self.path.startswith("/api/blobs/"):
            self._answer({self.path: self._put_blob})
        else:
            routes = {"/api/create": self._create, "/api/show": self._show, "/api/generate": self._generate}
            self._answer(routes)

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

    def _version(self, _: Any) -> None:
        self._json({"version": self.double.version})

    def _tags(self, _: Any) -> None:
        self._json(self.double.listing(self.double.models, modified_at="2026-01-01T00:00:00Z"))

    def _ps(self, _: Any) -> None:
        here = {n: d for n, d in self.double.loaded.items() if n in self.double.models}
        self._json(self.double.listing(here, size_vram=self.double.size_vram, expires_at="2030-01-01T00:00:00Z"))

    def _put_blob(self, data: bytes) -> None:
        self._send(self.double.put_blob(self.path.removeprefix("/api/blobs/"), data), b"")

    def _show(self, body: Any) -> None:
        self._json(self.double.show(body))

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


def full_name(name: str) -> str:
    return name if ":" in name else f"{name}:latest"
