"""The part of Go's template language that this project writes, and what Ollama makes of it.

`{{ if .System }}…{{ else }}…{{ end }}` (not nested), `{{ .System }}`, `{{ .Prompt }}`, `{{ .Response }}`; nothing is
trimmed. Everything else is refused, so that a text which Go would read as a command is never taken for a text.
"""

import re
from collections.abc import Sequence

SYSTEM, PROMPT, RESPONSE = "{{ .System }}", "{{ .Prompt }}", "{{ .Response }}"
IF_SYSTEM, ELSE, END = "{{ if .System }}", "{{ else }}", "{{ end }}"
# As Go's lexer: the first "{{" opens, whatever stands before or after it.
_ACTION = re.compile(r"\{\{.*?\}\}|\{\{", re.DOTALL)


class GoTemplateError(ValueError):
    """A template with something in it that this project never writes."""


def evaluate(template: str, *, system: str = "", prompt: str = "", response: str | None = None) -> str:
    """What the template renders.

    Args:
        template: Go template.
        system: System message; empty = none.
        prompt: The user's text.
        response: The model's answer in a turn that is over; None cuts the template where the answer begins, as Ollama
            does with the turn that is to be answered.

    Raises:
        GoTemplateError: an action that is not of the subset, or `if` and `end` that do not match.
    """
    done, shown, inside, at = [], True, False, 0
    for match in _ACTION.finditer(template):
        action = match[0]
        if shown:
            done.append(template[at : match.start()])
        at = match.end()
        if action == IF_SYSTEM and not inside:
            inside, shown = True, bool(system)
        elif action == ELSE and inside:
            shown = not shown
        elif action == END and inside:
            inside, shown = False, True
        elif action in (SYSTEM, PROMPT, RESPONSE):
            if action == RESPONSE and response is None:
                return "".join(done)
            if shown:
                done.append({SYSTEM: system, PROMPT: prompt, RESPONSE: response or ""}[action])
        else:
            raise GoTemplateError(
                f"expected {IF_SYSTEM}, {ELSE}, {END}, {SYSTEM}, {PROMPT} or {RESPONSE} in their places, got {action!r}"
            )
    if inside:
        raise GoTemplateError(f"{IF_SYSTEM} is never closed with {END}")
    return "".join([*done, template[at:]])


def converse(template: str, turns: Sequence[tuple[str, str]], prompt: str, system: str = "") -> str:
    """What Ollama renders of a conversation: the whole template for each turn, the system message in the first only.

    Args:
        template: Go template.
        turns: (prompt, response) of the turns that are over.
        prompt: What is to be answered.
        system: System message; empty = none.

    Raises:
        GoTemplateError: see `evaluate`.
    """
    if RESPONSE not in template:
        template += RESPONSE  # as Ollama does
    texts = []
    for question, answer in turns:
        texts.append(evaluate(template, system=system, prompt=question, response=answer))
        system = ""
    return "".join([*texts, evaluate(template, system=system, prompt=prompt)])
