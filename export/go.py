"""Go's template language as far as this project writes it, and how Ollama renders a TEMPLATE.

Every TEMPLATE that is written here goes over `.Messages`, so that Ollama renders a conversation in one go. With a
template of `.Prompt` and `.Response` it renders the whole of it for each turn, and so shows a model that was trained on
single turns a history that it has never seen.
"""

import re
from collections.abc import Sequence
from functools import cache

import jinja2

from export import ExportError
from export.engines.engine import PROMPT_SLOT, Message

IF_SYSTEM, SYSTEM, ELSE, END = "{{ if .System }}", "{{ .System }}", "{{ else }}", "{{ end }}"
MESSAGES, CONTENT = "{{ range .Messages }}", "{{ .Content }}"
IF_USER, ELSE_ASSISTANT = '{{ if eq .Role "user" }}', '{{ else if eq .Role "assistant" }}'
LAST = "{{ $last }}"
_NO_LAST, _SET_LAST = '{{ $last := "" }}', "{{ $last = .Content }}"
FIND_LAST = _NO_LAST + MESSAGES + IF_USER + _SET_LAST + END + END
"""Prefix of a template that has only the user's last message, as `LAST`."""

# Action → the same in Jinja, outside of `range` and in it.
_OUTSIDE = {
    IF_SYSTEM: "{% if system %}",
    SYSTEM: "{{ system }}",
    MESSAGES: "{% for message in messages %}",
    _NO_LAST: "{% set ns.last = '' %}",
    LAST: "{{ ns.last }}",
}
_WITHIN = {
    IF_USER: "{% if message.role == 'user' %}",
    ELSE_ASSISTANT: "{% elif message.role == 'assistant' %}",
    CONTENT: "{{ message.content }}",
    _SET_LAST: "{% set ns.last = message.content %}",
}
# As Go's lexer: the first "{{" opens, whatever stands before or after it.
_ACTION = re.compile(r"(\{\{.*?\}\}|\{\{)", re.DOTALL)


@cache
def _jinja(go: str) -> jinja2.Template:
    """The same template in Jinja. Raises ExportError: an action that is not known, or not at such a place."""
    blocks: list[str] = []
    pieces, source = _ACTION.split(go), ["{% set ns = namespace() %}"]
    for number, piece in enumerate(pieces):
        actions = _WITHIN if "for" in blocks else _OUTSIDE
        if number % 2 == 0:
            source.append(f"{{{{ pieces[{number}] }}}}")  # a text, which must not be read as Jinja
        elif piece == END and blocks:
            source.append(f"{{% end{blocks.pop()} %}}")
        elif piece == ELSE and blocks:
            source.append("{% else %}")
        elif piece in actions:
            source.append(actions[piece])
            blocks += [word for word in ("if", "for") if actions[piece].startswith(f"{{% {word} ")]
        else:
            raise ExportError(f"expected {', '.join([*actions, ELSE, END])} in their places, got {piece!r}")
    try:
        return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(  # noqa: S701  (no HTML)
            "".join(source), globals={"pieces": pieces}
        )
    except jinja2.TemplateSyntaxError as error:
        raise ExportError(f"{go!r}: {error}") from error


def render_go(go: str, messages: Sequence[Message]) -> str:
    """A conversation as Ollama renders it, up to where the answer begins.

    System messages are joined, and so are several messages of one role in a row. Raises ExportError: an action that is
    none of those above, so that a text which Go would run is never taken for a text.
    """
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1] = {**message, "content": f"{joined[-1]['content']}\n\n{message['content']}"}
        else:
            joined.append(message)
    if MESSAGES not in go:
        raise ExportError(f"expected a template that goes over .Messages, got {go!r}")
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    return _jinja(go).render(system=system, messages=joined)


def go_of_turns(template: str, end: str) -> str:
    """The Go template that repeats the training template for every turn, and closes each answer with `end`.

    A system message comes first, followed by an empty line. Raises ExportError: as `go_template`.
    """
    go_template(template)
    head, tail = template.split(PROMPT_SLOT)
    turn = f"{IF_USER}{head}{CONTENT}{tail}{ELSE_ASSISTANT}{CONTENT}{end}{END}"
    return f"{IF_SYSTEM}{SYSTEM}\n\n{END}{MESSAGES}{turn}{END}"


def go_template(template: str) -> str:
    """The Go template that renders the last question in the training template, whatever was said before.

    Raises ExportError: {prompt} is missing or repeated, or the text holds Go's "{{".
    """
    if (count := template.count(PROMPT_SLOT)) != 1:
        raise ExportError(f"expected {PROMPT_SLOT} once in the template, found it {count} times: {template!r}")
    if "{{" in template:
        raise ExportError(f"the template holds '{{{{', which Go's template language would run: {template!r}")
    return FIND_LAST + template.replace(PROMPT_SLOT, LAST)
