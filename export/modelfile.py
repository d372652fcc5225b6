"""Modelfiles: what Ollama needs beside the GGUF so that it serves the model as it was trained.

The grammar is that of Ollama's own parser: a command word, a space, a value to the end of the line, or in one
or three double quotes, inside which nothing is escaped. A value this cannot carry is refused, and
`render_modelfile` reads its own text back before it hands it out.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from export.gotemplate import ELSE, IF_SYSTEM, PROMPT

PROMPT_SLOT = "{prompt}"
GO_PROMPT = PROMPT
_COMMAND = re.compile(r"\s*(?:(parameter)[ \t]+(\w+)|([a-z]+))[ \t](.*)", re.IGNORECASE | re.DOTALL)
BOS_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<|begin▁of▁sentence|>", "[BOS]")


class ModelfileError(ValueError):
    """A Modelfile that Ollama would refuse or, worse, read as something else."""


@dataclass(frozen=True)
class ModelfileSpec:
    """One served model.

    Attributes:
        from_path: GGUF relative to the Modelfile, "./…".
        template: Go template of the prompt, from `go_template`.
        stop: Words that end an answer; at least one, or Ollama may guess a known chat format's.
        num_ctx: Context, tokens.
        temperature: Sampling temperature; 0 is greedy. Ollama's default is 0.8.
        adapter_path: GGUF adapter relative to the Modelfile. Ollama 0.34.1 and later refuse adapters.
        num_predict: Limit of an answer, tokens.
        repeat_penalty: 1.0 is off. Ollama's default of 1.1 changes greedy answers that repeat digits.
        license: License text.
        system: System message; the template must hold {{ .System }}.

    Raises:
        ModelfileError: lists every field at fault.
    """

    from_path: str
    template: str
    stop: Sequence[str]
    num_ctx: int
    temperature: float
    adapter_path: str | None = None
    num_predict: int | None = None
    repeat_penalty: float | None = 1.0
    license: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if problems := _problems(self):
            raise ModelfileError("The Modelfile cannot be written:\n  - " + "\n  - ".join(problems))

    @property
    def parameters(self) -> dict[str, object]:
        """The PARAMETER lines as /api/create takes them."""
        return {
            "num_ctx": self.num_ctx,
            "temperature": self.temperature,
            **({} if self.num_predict is None else {"num_predict": self.num_predict}),
            **({} if self.repeat_penalty is None else {"repeat_penalty": self.repeat_penalty}),
            "stop": list(self.stop),
        }


def _problems(spec: ModelfileSpec) -> list[str]:
    problems = []
    for name, path in (("from_path", spec.from_path), ("adapter_path", spec.adapter_path)):
        if path is None:
            continue
        pure = PurePosixPath(path)
        if not path.startswith("./") or ".." in pure.parts or pure.suffix != ".gguf" or '"' in path:
            problems.append(f"{name}: expected a relative path like ./model.gguf, got {path!r}.")
    if spec.template.count(GO_PROMPT) != 1:
        n = spec.template.count(GO_PROMPT)
        problems.append(f"template: expected {GO_PROMPT} once, found it {n} times in {spec.template!r}.")
    if spec.system is not None and ".System" not in spec.template:
        problems.append("system: the template has no {{ .System }}, so Ollama would drop it; put it into the template.")
    if not spec.stop or not all(spec.stop) or len(set(spec.stop)) != len(spec.stop):
        problems.append(f"stop: expected at least one word, none empty or twice, got {list(spec.stop)!r}.")
    predict, penalty = spec.num_predict, spec.repeat_penalty
    numbers = (
        ("num_ctx", spec.num_ctx, spec.num_ctx >= 1, "≥ 1 token"),
        ("num_predict", predict, predict is None or predict >= 1, "≥ 1 token"),
        ("temperature", spec.temperature, 0 <= spec.temperature < math.inf, "≥ 0"),
        ("repeat_penalty", penalty, penalty is None or 0 < penalty < math.inf, "> 0"),
    )
    problems += [f"{name}: expected {wanted}, got {value}." for name, value, ok, wanted in numbers if not ok]
    fields = ("from_path", "adapter_path", "template", "system", "license")
    texts = [*((name, getattr(spec, name)) for name in fields), *(("stop", word) for word in spec.stop)]
    for name, text in texts:
        if text is None:
            continue
        if not text:
            problems.append(f"{name}: expected a text or None, got an empty one.")
        if '"""' in text:
            problems.append(f'{name}: holds """, which no Modelfile can carry.')
        # Ollama's parser drops these without a word.
        lost = sorted({c for c in text if not c.isprintable() and c not in "\n\t"})
        if lost:
            names = ", ".join(f"U+{ord(c):04X}" for c in lost)
            problems.append(f"{name}: holds {names}, which Ollama's Modelfile parser drops; remove it.")
    return problems


def go_template(template: str) -> str:
    """The Go template that renders what `template.replace("{prompt}", text)` renders.

    Args:
        template: Training template with the literal {prompt} exactly once.

    Raises:
        ModelfileError: {prompt} is missing or repeated, or the text holds Go's "{{".
    """
    if (found := template.count(PROMPT_SLOT)) != 1:
        raise ModelfileError(f"expected {PROMPT_SLOT} once in the template, found it {found} times: {template!r}")
    if "{{" in template:
        raise ModelfileError(f"the template holds '{{{{', which Go's template language would run: {template!r}")
    return template.replace(PROMPT_SLOT, GO_PROMPT)


def check_bos(template: str, gguf_adds_bos: bool, bos_token: str | None = None) -> None:
    """Refuses a template that would put the beginning-of-sequence token there twice.

    Args:
        template: Training or Go template.
        gguf_adds_bos: `tokenizer.ggml.add_bos_token` of the GGUF.
        bos_token: The model's own token, beside the well-known ones.

    Raises:
        ModelfileError: names the token.
    """
    tokens = (*BOS_TOKENS, *([bos_token] if bos_token else []))
    # A token behind `{{ if .System }}` or `{{ else }}` leads as well.
    starts = [template, *(template.split(action, 1)[1] for action in (IF_SYSTEM, ELSE) if action in template)]
    leading = next((t for t in tokens for start in starts if start.lstrip().startswith(t)), None)
    if gguf_adds_bos and leading is not None:
        raise ModelfileError(
            f"the template starts with {leading}, and the GGUF adds that token itself, so the model would "
            "see it twice; take it out of the template."
        )


def spec_of(facts: Mapping[str, Any], adapter_path: str | None = None) -> ModelfileSpec:
    """What serving.json says about a model; greedy, since that is how it is scored.

    Args:
        facts: template (with `{prompt}`), stop, num_ctx; from a chat template also go and system; license.
        adapter_path: GGUF adapter relative to the Modelfile.

    Raises:
        ModelfileError: lists every field at fault.
    """
    return ModelfileSpec(
        from_path="./model.gguf",
        adapter_path=adapter_path,
        template=facts.get("go") or go_template(facts["template"]),
        stop=facts["stop"],
        num_ctx=facts["num_ctx"],
        temperature=0.0,
        system=facts.get("system"),
        license=facts.get("license"),
    )


def render_modelfile(spec: ModelfileSpec, *, gguf_adds_bos: bool = True, bos_token: str | None = None) -> str:
    """The Modelfile's text, read back and compared before it is returned.

    Args:
        spec: What to serve.
        gguf_adds_bos: `tokenizer.ggml.add_bos_token` of the GGUF.
        bos_token: The model's own BOS token.

    Raises:
        ModelfileError: BOS would come twice, or the text would not read back as `spec`.
    """
    check_bos(spec.template, gguf_adds_bos, bos_token)
    lines = [f"FROM {spec.from_path}"]
    if spec.adapter_path is not None:
        lines.append(f"ADAPTER {spec.adapter_path}")
    lines.append(f"TEMPLATE {_quoted(spec.template)}")
    if spec.system is not None:
        lines.append(f"SYSTEM {_quoted(spec.system)}")
    for name, value in spec.parameters.items():
        for one in value if isinstance(value, list) else [value]:
            lines.append(f"PARAMETER {name} {_quoted(one) if isinstance(one, str) else repr(one)}")
    if spec.license is not None:
        lines.append(f"LICENSE {_quoted(spec.license)}")
    text = "\n".join(lines) + "\n"
    if (back := parse_modelfile(text)) != spec:
        raise ModelfileError(f"the Modelfile reads back differently: expected {spec}, got {back}")
    return text


def _quoted(value: str) -> str:
    return f'"""{value}"""' if '"' in value or "\n" in value else f'"{value}"'


def parse_modelfile(text: str) -> ModelfileSpec:
    """Reads a Modelfile of this project.

    Raises:
        ModelfileError: names the line and what was expected there.
    """
    texts = {"from": "from_path", "adapter": "adapter_path"} | {k: k for k in ("template", "system", "license")}
    numbers: dict[str, Callable[[str], object]] = {
        "num_ctx": int,
        "num_predict": int,
        "temperature": float,
        "repeat_penalty": float,
    }
    fields: dict[str, object] = {"repeat_penalty": None}
    stop: list[str] = []
    for line, command, name, value in _commands(text):
        key = texts.get(command) if command != "parameter" else name
        if key == "stop":
            stop.append(value)
            continue
        if key is None or (command == "parameter" and key not in numbers):
            known = ", ".join([*texts, *(f"parameter {n}" for n in (*numbers, "stop"))])
            raise ModelfileError(f"line {line}: expected one of {known}, got {' '.join([command, name]).strip()!r}")
        if fields.get(key) is not None:
            raise ModelfileError(f"line {line}: {key} is given twice; Ollama would use the last and say nothing")
        try:
            fields[key] = numbers[key](value) if command == "parameter" else value
        except ValueError:
            raise ModelfileError(f"line {line}: expected a number for {key}, got {value!r}") from None
    needed = [n for n in ("from_path", "template", "num_ctx", "temperature") if n not in fields]
    if needed:
        raise ModelfileError(f"expected {', '.join(needed)}, found none; write the Modelfile with render_modelfile")
    return ModelfileSpec(stop=stop, **fields)  # type: ignore[arg-type]


def _commands(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Yields (line, command in lower case, parameter name or "", value) in file order."""
    lines = enumerate(text.split("\n"), start=1)
    for start, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _COMMAND.match(line)
        if match is None:
            raise ModelfileError(f"line {start}: expected a command and a value, got {line!r}")
        value = match[4]
        while (plain := _unquoted(value.strip())) is None:
            following = next(lines, None)
            if following is None:
                raise ModelfileError(f"line {start}: the quotes are never closed")
            value += "\n" + following[1]
        yield start, (match[1] or match[3]).lower(), match[2] or "", plain


def _unquoted(value: str) -> str | None:
    """The value without its quotes; None while they are open. Nothing inside is escaped."""
    for quote in ('"""', '"'):
        if value.startswith(quote):
            closed = len(value) >= 2 * len(quote) and value.endswith(quote)
            return value[len(quote) : -len(quote)] if closed else None
    return value
