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
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.gotemplate import evaluate
from tests.ollama_double_engine import DEFAULTS, Refusal, by_llama, by_reply, check_types, load
from tests.ollama_double_http import Handler, Server, full_name

LOAD_COLD_NS, LOAD_WARM_NS = 260_000_000, 1_000_000

MISBEHAVIOURS = {
    None,
    "die",
    "hang",
    "drop",
    "wrong_template",
    "no_success",
    "break_create",
    "forget_settings",
    "error_500_n_times",
    "wrong_json",
    "missing_response",
    "not_done",
    "missing_fields",
    "forget_model",
    "hang_all",
    "bare_list",
}


@dataclass
class Model:
    gguf: Path
    adapter: Path | None
    stored: str  # digest of the weights as stored
    digest: str  # of the whole model
    template: str
    system: str
    license: str
    parameters: dict[str, Any]


class OllamaDouble:
    """A server to use in a `with` block.

    Args:
        reply: Rendered prompt → answer. None runs llama.cpp on the uploaded GGUF.
        tokenize: Text → token ids; used with `reply` only. The default is BOS and one token per UTF-8 byte.
        version: Answer of /api/version. From 0.34.1 on adapters are refused, as the real one does.
        misbehave: How to fail; may be set at any time. "die": breaks off in the next generation and is gone;
            "hang": never answers a generation; "drop": closes the connection of a generation;
            "wrong_template": renders a BOS too many; "no_success", "break_create": creation ends early, the
            latter within the stream; "forget_settings": creation stores no parameters; "error_500_n_times": a 500
            for a generation; "wrong_json", "missing_response", "not_done": a 200 with something else than a finished
            answer; "missing_fields": an older release, which gives texts without counts, times and reasons;
            "forget_model": deletes the model that is asked for; "hang_all": answers nothing at all but HEAD;
            "bare_list": lists models without their digests.
        times: How many generations that goes on; afterwards the server is well.
        size_vram: Bytes on the GPU, answer of /api/ps.

    Attributes:
        requests: (method, path, decoded JSON body or number of bytes), in order of arrival.
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
        assert misbehave in MISBEHAVIOURS, misbehave
        self.reply = reply
        self.tokenize = tokenize or (lambda text: [1, *text.encode()])
        self.version = version
        self.misbehave = misbehave
        self.times = times
        self.size_vram = size_vram
        self.requests: list[tuple[str, str, Any]] = []
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
        """Ends the server: no port answers any more."""
        if not self.gone.is_set():
            self.gone.set()
            self._server.shutdown()
            self._server.server_close()

    # --- blobs and models ---------------------------------------------------------------------------------

    def put_blob(self, digest: str, data: bytes) -> int:
        if not re.fullmatch(r"sha256[:-][0-9a-f]{64}", digest):
            raise Refusal(400, "invalid digest format")
        came = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if came != digest.replace("-", ":"):
            raise Refusal(400, f'digest mismatch, expected "{digest}", got "{came}"')
        known = came in self.blobs
        path = Path(self._store.name) / came.replace(":", "-")
        beside = path.with_name(f"{path.name}.{threading.get_ident()}")  # whoever reads meanwhile sees a whole file
        beside.write_bytes(data)
        beside.replace(path)
        self.blobs[came] = path
        return 200 if known else 201

    def _blob(self, files: dict[str, str]) -> Path | None:
        path = None
        for name, digest in files.items():
            if name.startswith("/") or ".." in name.split("/"):
                raise Refusal(400, f"file path must be relative: {name}")
            if digest not in self.blobs:
                raise Refusal(500, f"open blobs/{digest.replace(':', '-')}: no such file or directory")
            path = self.blobs[digest]
        return path

    def create(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The statuses of a creation; the refusals that come before any status are raised at once."""
        if body.get("adapters") and tuple(map(int, self.version.split("."))) >= (0, 34, 1):
            raise Refusal(400, "LoRA adapters are no longer supported")
        if not body.get("files"):
            raise Refusal(400, "neither 'from' or 'files' was specified")
        gguf, adapter = self._blob(body["files"]), self._blob(body.get("adapters") or {})
        assert gguf is not None
        if self.reply is None and not all(p.read_bytes()[:4] == b"GGUF" for p in (gguf, adapter) if p):
            raise Refusal(400, "invalid file magic")
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
            body.get("license") or "",
            {} if self.misbehave == "forget_settings" else body.get("parameters") or {},
        )
        layers = [
            stored,
            adapter and adapter.name,
            model.template,
            model.system,
            model.license,
            model.parameters,
        ]
        model.digest = hashlib.sha256(json.dumps(layers, sort_keys=True).encode()).hexdigest()
        yield {"status": "writing manifest"}
        self.models[full_name(body["model"])] = model
        yield {"status": "success"}

    def model(self, body: dict[str, Any]) -> Model:
        name = body.get("model") or body.get("name") or ""
        if full_name(name) not in self.models:
            raise Refusal(404, f"model '{name}' not found")
        return self.models[full_name(name)]

    def listing(self, names: dict[str, Any], **more: Any) -> dict[str, Any]:
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
            "license": model.license,
            **({"system": model.system} if model.system else {}),
            "parameters": "\n".join(lines),
            "modelfile": f"FROM /models/blobs/sha256-{model.stored}\n"
            + (f"ADAPTER /models/blobs/{model.adapter.name}\n" if model.adapter else "")
            + f"TEMPLATE {model.template}\n",
            "model_info": {"general.architecture": "llama"},
            "details": {"format": "gguf", "family": "llama"},
            "capabilities": ["completion"],
        }

    def strike(self, body: dict[str, Any]) -> str | None:
        """How this generation goes wrong, if it does."""
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
        rendered = body["prompt"] if body.get("raw") else self._render(model, body)
        if body.get("_debug_render_only"):
            yield {**base, "response": "", "done": False, "_debug_info": {"rendered_template": rendered}}
            return
        if self.reply is not None:
            text, final = by_reply(self.reply, self.tokenize, rendered, options)
        else:
            key = (model.gguf, model.adapter, options["num_ctx"])
            if key not in self._engines:
                self._engines[key] = load(model.gguf, model.adapter, options)
            text, final = by_llama(self._engines[key], rendered, options)
        for piece in re.findall(r".{1,4}", text, re.DOTALL):
            yield {**base, "response": piece, "done": False}
        final = {"total_duration": load_ns + final["prompt_eval_duration"] + final["eval_duration"], **final}
        final = {**final, "load_duration": load_ns}
        yield {**base, "response": "", "done": True, **{k: v for k, v in final.items() if v}}

    def _render(self, model: Model, body: dict[str, Any]) -> str:
        template = body.get("template") or model.template
        values = {"Prompt": body["prompt"], "System": body.get("system") or model.system, "Response": ""}
        if "{{ if" in template:
            rendered = evaluate(template, system=values["System"] or "", prompt=values["Prompt"])
        else:
            rendered = re.sub(r"\{\{ *\.(\w+) *\}\}", lambda m: values[m[1]], template.split("{{ .Response }}")[0])
        return ("<s>" if self.misbehave == "wrong_template" else "") + rendered
