"""Your own conversations, instructions and texts, in the formats that language models are commonly trained on.

The columns tell which form the rows have: messages (role, content), ShareGPT's conversations (from, value), instruction
with input and output, prompt and completion, or plain text. A row with several turns is one item: every answer in it is
learned, given what was said before; scoring asks for the last one.

A plain text is learned as a whole, from its first token to its end, without a template. It is scored by how a model
continues its first half, again without a template.
"""

import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from evaluation import EvaluationError
from evaluation.tasks import Field, Item, RowError, brief, digest, instruct, optional_text, text
from trainers.words import as_written, suggest

NAME = "chat"
TITLE = "Chat ROUGE-L"
PRIMARY = "chat_rouge_l"
METRICS = instruct.text_metrics(NAME)
FIELDS = {
    "messages": Field("messages", False, "a list of {role, content}"),
    "conversations": Field("conversations", False, "a list of {from, value}"),
    "instruction": Field("instruction", False, "the instruction"),
    "input": Field("input", False, "what the instruction is about, may be empty"),
    "output": Field("output", False, "the answer"),
    "history": Field("history", False, "a list of [question, answer] before the instruction"),
    "prompt": Field("prompt", False, "the question"),
    "completion": Field("completion", False, "the answer"),
    "text": Field("text", False, "a text"),
    "system": Field("system", False, "the system message, may be empty"),
}
_FORMS = {  # name → required fields, optional fields
    "messages with roles": (("messages",), ("system",)),
    "ShareGPT conversations": (("conversations",), ("system",)),
    "instructions with outputs": (("instruction", "output"), ("input", "history", "system")),
    "prompts with completions": (("prompt", "completion"), ("system",)),
    "plain texts": (("text",), ()),
}
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_BLANK = re.compile(r"(?<=\S)\s")
_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")
_TOOLS = ("tool", "function", "function_call", "observation", "ipython")


def recognize(columns: Sequence[str], mapping: Mapping[str, str | None]) -> tuple[dict[str, str], str]:
    """Field → column of the one form that the rows have, and a sentence that names the form."""
    mapped = {name: column for name, column in mapping.items() if column is not None}
    names = {name: mapped.get(name, name) for name in FIELDS if mapping.get(name, "") is not None}
    column_of = {name: as_written(column, columns) for name, column in names.items()}
    forms = [form for form, (required, _) in _FORMS.items() if not mapped.keys().isdisjoint(required)] or [
        form for form, (required, _) in _FORMS.items() if all(column_of.get(name) in columns for name in required)
    ]
    described = {form: f"{form} ({_listed(column_of.get(name, name) for name in _FORMS[form][0])})" for form in forms}
    advice = "say which is meant in prepare_data.columns, e.g."
    if len(forms) > 1:
        example = ", ".join(f"{name}: {column_of.get(name, name)}" for name in _FORMS[forms[0]][0])
        raise EvaluationError(f"rows could be {' or '.join(described.values())}; {advice} {{{example}}}.")
    if not forms:
        known = "; ".join(f"{form}: {_listed(required)}" for form, (required, _) in _FORMS.items())
        raise EvaluationError(
            f"expected the columns of one form ({known}), got {', '.join(columns) or 'none'}; {advice} "
            "{messages: dialogue} or {prompt: question, completion: answer}."
        )
    required, optional = _FORMS[forms[0]]
    fields = {name: column_of.get(name, name) for name in required}
    fields |= {name: column_of[name] for name in optional if name in mapped or column_of.get(name) in columns}
    more = [column for name, column in fields.items() if name not in required]
    return fields, f"Rows are {described[forms[0]]}{f', with {_listed(more)}' if more else ''}."


def _listed(columns: Iterable[str]) -> str:
    names = list(columns)
    return f"column{'s' if len(names) > 1 else ''} {' and '.join(filter(None, (', '.join(names[:-1]), names[-1])))}"


def make_item(item_id: str, row: Mapping[str, Any]) -> Item:
    if "text" in row:
        return _of_text(item_id, text(row, "text"))
    system, unanswered, turns = optional_text(row, "system"), "", list[tuple[str, str]]()
    if field := next((name for name in ("messages", "conversations", "history") if name in row), None):
        try:
            if field == "history":
                turns = _history(row["history"])
            else:
                system, turns, unanswered = _conversation(row[field], FIELDS[field].about, system)
        except ValueError as error:
            raise RowError(field, str(error)) from error
    if "instruction" in row:
        turns.append((instruct.join_input(text(row, "instruction"), optional_text(row, "input")), text(row, "output")))
    elif "prompt" in row:
        turns.append((text(row, "prompt"), text(row, "completion")))
    *before, (prompt, answer) = turns
    # Many tokenizers would make one token of a template's last line break and those that an earlier answer begins with.
    plain = [(question, _BLANK_LINES.sub("", earlier)) for question, earlier in before]
    truth: dict[str, Any] = {"answer": answer, **({"unanswered": unanswered} if unanswered else {})}
    truth |= {"blank_lines": True} if plain != before else {}
    return Item(item_id, NAME, prompt, answer, truth, turns=tuple(plain), system=system or None)


def _of_text(item_id: str, whole: str) -> Item:
    """Split at the blank nearest to the middle."""
    start, end = len(whole) - len(whole.lstrip()), len(whole.rstrip())
    if end - start < 2:
        raise RowError("text", f"expected at least two characters, got {whole!r}")
    middle = (start + end) // 2
    blanks = [match.start() for match in _BLANK.finditer(whole, start, end)]
    cut = min(blanks, key=lambda place: abs(place - middle), default=middle)
    return Item(item_id, NAME, whole[:cut], whole[cut:], {"answer": whole[cut:].strip()}, whole=True)


def _parsed(value: Any) -> Any:
    """A list, which in a cell of a CSV file is JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected a list in JSON, got broken JSON ({error})") from error
    return value


def _history(value: Any) -> list[tuple[str, str]]:
    pairs = _parsed(value) or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"expected a list of [question, answer], got {brief(pairs)}")
    return [
        (_content(f"question {n}", question), _content(f"answer {n}", answer))
        for n, (question, answer) in enumerate(pairs, start=1)
    ]


def _conversation(value: Any, about: str, system: str) -> tuple[str, list[tuple[str, str]], str]:
    """(system message, turns of question and answer, a last question without an answer)."""
    messages = _parsed(value)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"expected {about}, got {'nothing' if messages in (None, []) else brief(messages)}")
    spoken: list[tuple[str, str]] = []
    for number, message in enumerate(messages, start=1):
        where = f"turn {number}"
        role, content = _message(where, message)
        if role == "system":
            if number > 1 or (system and content):
                place = "among the turns" if number > 1 else "in addition to field system"
                raise ValueError(f"{where}: expected one system message, at the start, got one {place}")
            system = system or content
        elif spoken and spoken[-1][0] == role:
            other = "an answer" if role == "user" else "a question"
            raise ValueError(f"{where}: expected {other}, got two {role} turns in a row")
        elif not spoken and role == "assistant":
            raise ValueError(f"{where}: expected a user turn first, got an assistant turn")
        else:
            spoken.append((role, content))
    unanswered = spoken.pop()[1] if spoken and spoken[-1][0] == "user" else ""
    if not spoken:
        raise ValueError("expected an assistant turn, got none")
    return system, [(spoken[n][1], spoken[n + 1][1]) for n in range(0, len(spoken), 2)], unanswered


def _message(where: str, message: Any) -> tuple[str, str]:
    """Role (system, user or assistant) and content."""
    if not isinstance(message, dict):
        raise ValueError(f"{where}: expected {{role, content}} or {{from, value}}, got {brief(message)}")
    role, content = (next((message[key] for key in keys if message.get(key) is not None), None)
                     for keys in (("role", "from"), ("content", "value")))  # fmt: skip
    if role in _TOOLS or any(message.get(key) for key in ("tool_calls", "function_call")):
        raise ValueError(f"{where}: tool calls are not supported yet")
    plain_role = _ROLES.get(str(role).casefold())
    if plain_role is None:
        raise ValueError(f"{where}: expected a role, got {brief(role)}{suggest(str(role), _ROLES)}")
    if message.get("weight") not in (None, 1):
        raise ValueError(f"{where}: expected weight 1, since every answer is learned, got {message['weight']!r}")
    return plain_role, _content(f"{where} ({role})", content, empty=plain_role == "system")


def _content(where: str, content: Any, empty: bool = False) -> str:
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if others := [str(part.get("type")) for part in parts if part.get("type") != "text"]:
            raise ValueError(f"{where}: expected parts of text, got {', '.join(others)}; task {NAME} is text only")
        content = "\n".join(str(part.get("text") or "") for part in parts)
    try:
        return (optional_text if empty else text)({"content": content}, "content")
    except RowError as error:
        raise ValueError(f"{where}: {error.problems[0][1]}") from error


def complete(items: Sequence[Item]) -> list[str]:
    unanswered = sum("unanswered" in item.truth for item in items)
    several = sum(bool(item.turns) for item in items)
    notes = [f"{several} of {len(items)} conversations have several turns; each answer is learned."] * (several > 0)
    notes += [f"{unanswered} conversations end with an unanswered question, which is dropped."] * (unanswered > 0)
    blank = sum("blank_lines" in item.truth for item in items)
    return notes + [f"Empty lines before earlier answers are left out in {blank} conversations."] * (blank > 0)


def group(item: Item) -> Hashable:
    """The questions of a conversation, so that parts of one are never in different splits. A text is its own group."""
    if item.whole:
        return digest(str(item.context))
    return tuple(map(digest, [*(question for question, _ in item.turns), item.prompt]))


score = instruct.score_text
summarize = partial(instruct.summarize_texts, name=NAME)
