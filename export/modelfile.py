"""Modelfiles: what Ollama needs beside the GGUF so that it serves the model as it was trained.

A value stands in one or three double quotes, inside which Ollama's parser escapes nothing; what that cannot carry is
refused by name.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from export import ExportError
from export.engines.engine import PROMPT_SLOT, Asked, Raw, conversation, messages_of
from export.go import LAST, SYSTEM, go_template, render_go
from trainers.encode import spelled_out

BOS_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<|begin▁of▁sentence|>", "[BOS]")


class Serving(BaseModel):
    """serving.json, how a model is asked and served; answers are greedy, since that is how they are scored."""

    model_config = ConfigDict(strict=True, frozen=True)

    template: str  # round every question, with `{prompt}` once
    stop: list[str]  # at least one, or Ollama may guess a known chat format's
    go: str | None = None  # Ollama's TEMPLATE, where it comes from a chat template
    system: str | None = None  # Ollama's SYSTEM; the Go template must hold {{ .System }}
    model_name: str | None = None  # in Ollama; None: that of the arm
    quantization: str = "f16"  # of the merged file
    license: str | None = None
    num_ctx: int  # tokens
    adds_bos: bool = True  # tokenizer and GGUF put BOS in front of every text
    bos_token: str | None = None
    control: list[str] = []  # texts that the server reads as control tokens wherever they stand

    @classmethod
    def read(cls, file: Path) -> "Serving":
        """Raises ExportError where the file is missing or damaged; names it and every key at fault."""
        try:
            return cls.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            raise ExportError(f"{file}: no such file; run `dvc repro export`, which writes it") from None
        except OSError as error:
            raise ExportError(f"{file}: cannot be read ({error}); export again") from error
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, e['loc'])) or 'content'}: {e['msg']}"
                + ("" if e["type"] in ("missing", "json_invalid") else f", got {e['input']!r}")
                for e in error.errors()
            ]
            raise ExportError(f"{file}: {'; '.join(faults)}; export again") from error

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)

    @property
    def go_template(self) -> str:
        """Ollama's TEMPLATE. Raises ExportError: see `export.go.go_template`."""
        return self.go or go_template(self.template)

    @property
    def converses(self) -> bool:
        """Whether the model is shown what was said before; else the last question alone."""
        return self.go is not None and LAST not in self.go

    def render(self, asked: Asked) -> str:
        """What the server makes of a question or a conversation.

        Raises ExportError: it spells out a control token; or see `export.go.render_go`.
        """
        messages = messages_of(asked)
        if token := spelled_out(self.control, *(message["content"] for message in messages)):
            raise ExportError(
                f"expected text, got {token} in what is asked, which every server reads as a control token"
            )
        if isinstance(asked, Raw):
            return asked
        given = self.system is None or messages[0]["role"] == "system"
        return render_go(self.go_template, messages if given else [*conversation("", self.system)[:1], *messages])

    @property
    def parameters(self) -> dict[str, Any]:
        """The PARAMETER lines as /api/create takes them. Ollama's own defaults: temperature 0.8, repeat_penalty 1.1.

        /v1/chat/completions puts temperature 1 in place of ours where a request names none; top_k 1 it leaves alone, so
        that it answers greedily as well.
        """
        return {"num_ctx": self.num_ctx, "temperature": 0.0, "top_k": 1, "repeat_penalty": 1.0, "stop": self.stop}

    def check(self) -> None:
        """Refuse what no Modelfile can say. Raises ExportError: lists every field at fault."""
        template, problems = self.go_template, []
        try:
            if (rendered := self.render(PROMPT_SLOT)) != self.template:
                problems.append(
                    f"go: expected a template that makes {self.template!r} of a question, got {rendered!r}."
                )
        except ExportError as error:
            problems.append(f"go: {error}.")
        if self.system is not None and ".System" not in template:
            problems.append(f"system: the template has no {SYSTEM}, so Ollama would drop it; put it into the template.")
        if token := spelled_out(self.control, self.system):
            problems.append(f"system: holds {token}, which the server reads as a control token; take it out.")
        if not self.stop or not all(self.stop) or len(set(self.stop)) != len(self.stop):
            problems.append(f"stop: expected at least one word, none empty or twice, got {self.stop!r}.")
        bos = next((t for t in (*BOS_TOKENS, self.bos_token) if t and self.template.lstrip().startswith(t)), None)
        if self.adds_bos and bos is not None:
            problems.append(
                f"template: starts with {bos}, and the GGUF adds that token itself, so the model would see it twice; "
                "take it out of the template."
            )
        if self.num_ctx < 1:
            problems.append(f"num_ctx: expected ≥ 1 token, got {self.num_ctx}.")
        texts = [("template", template), ("system", self.system), ("license", self.license)]
        for name, text in [*texts, *(("stop", word) for word in self.stop)]:
            if text is None:
                continue
            if not text:
                problems.append(f"{name}: expected a text or None, got an empty one.")
            if '"""' in text:
                problems.append(f'{name}: holds """, which no Modelfile can carry.')
            # Ollama's parser drops these without a word.
            if lost := sorted({c for c in text if not c.isprintable() and c not in "\n\t"}):
                names = ", ".join(f"U+{ord(c):04X}" for c in lost)
                problems.append(f"{name}: holds {names}, which Ollama's Modelfile parser drops; remove it.")
        if problems:
            raise ExportError("The Modelfile cannot be written:\n  - " + "\n  - ".join(problems))

    def modelfile(self, gguf: str = "./model.gguf", adapter: str | None = None) -> str:
        """The Modelfile's text; paths are relative to it. Ollama 0.34.1 and later refuse adapters."""
        lines = [f"FROM {gguf}", *([f"ADAPTER {adapter}"] if adapter else []), f"TEMPLATE {_quoted(self.go_template)}"]
        if self.system is not None:
            lines.append(f"SYSTEM {_quoted(self.system)}")
        for name, value in self.parameters.items():
            for one in value if isinstance(value, list) else [value]:
                lines.append(f"PARAMETER {name} {_quoted(one) if isinstance(one, str) else repr(one)}")
        if self.license is not None:
            lines.append(f"LICENSE {_quoted(self.license)}")
        return "\n".join(lines) + "\n"


def _quoted(value: str) -> str:
    return f'"""{value}"""' if '"' in value or "\n" in value else f'"{value}"'
