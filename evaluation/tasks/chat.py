"""Anybody's conversations, instructions and texts: what language models are commonly trained on.

Rows have one of these forms, told by their columns: messages (role, content), ShareGPT's conversations (from, value),
instruction with input and output, prompt and completion, or plain text. A row with several turns is one item: every
answer in it is learnt, given what was said before; the last one is asked for when the model is scored.

A plain text is learnt as a whole, from its first token to its end, and put through no template. It is scored by how a
model goes on from its first half, again without a template.
"""

import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from evaluation.parsing import score_text, summarize_texts, text_metrics
from evaluation.tasks import Field, Item, ItemError, RowError, digest, instruct, optional_text, shown, text
from trainers.words import suggest

NAME = "chat"
TITLE = "Chat ROUGE-L"
PRIMARY = "chat_rouge_l"
METRICS = text_metrics(NAME)
FIELDS = {
    "messages": Field("messages", False, "a list of {role, content}"),
    "conversations": Field("conversations", False, "a list of {from, value}"),
    "instruction": Field("instruction", False, "what is to be done"),
    "input": Field("input", False, "what it is to be done with, may be empty"),
    "output": Field("output", False, "the answer"),
    "history": Field("history", False, "a list of [question, answer] before the instruction"),
    "prompt": Field("prompt", False, "the question"),
    "completion": Field("completion", False, "the answer"),
    "text": Field("text", False, "a text"),
    "system": Field("system", False, "the system message, may be empty"),
}
_FORMS = {  # name → fields that make it, fields that it may have
    "messages with roles": (("messages",), ("system",)),
    "ShareGPT conversations": (("conversations",), ("system",)),
    "instructions with outputs": (("instruction", "output"), ("input", "history", "system")),
    "prompts with completions": (("prompt", "completion"), ("system",)),
    "plain texts": (("text",), ()),
}
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_TOOLS = ("tool", "function", "function_call", "observation", "ipython")
_NO_TOOLS = "tool calls are not supported yet"


def recognise(columns: Sequence[str], asked: Mapping[str, str | None]) -> tuple[dict[str, str], str]:
    """The fields of the one form that the rows have, and which that is."""
    named = {name: column for name, column in asked.items() if column is not None}
    here = {name: named.get(name, own.column) for name, own in FIELDS.items() if asked.get(name, "") is not None}
    told = [form for form, (needed, _) in _FORMS.items() if not named.keys().isdisjoint(needed)]
    found = told or [form for form, (needed, _) in _FORMS.items() if all(here.get(name) in columns for name in needed)]
    words = {form: f"{form} ({_listed(here.get(name) or name for name in _FORMS[form][0])})" for form in found}
    if len(found) != 1:
        ask = "say which is meant in prepare_data.columns, e.g."
        if found:
            shown_as = ", ".join(f"{name}: {here.get(name) or name}" for name in _FORMS[found[0]][0])
            raise ItemError(f"rows could be {' or '.join(words.values())}; {ask} {{{shown_as}}}.")
        forms = "; ".join(f"{form}: {_listed(needed)}" for form, (needed, _) in _FORMS.items())
        raise ItemError(
            f"expected the columns of one form ({forms}), got {', '.join(columns) or 'none'}; {ask} "
            "{messages: dialogue} or {prompt: question, completion: answer}."
        )
    own, more = _FORMS[found[0]]
    used = {name: here.get(name) or name for name in own}
    used |= {name: str(here[name]) for name in more if name in named or here.get(name) in columns}
    beside = [column for name, column in used.items() if name not in own]
    return used, f"Rows are {words[found[0]]}{f', with {_listed(beside)}' if beside else ''}."


def _listed(columns: Iterable[str]) -> str:
    names = list(columns)
    return f"column{'s' if len(names) > 1 else ''} {' and '.join(filter(None, (', '.join(names[:-1]), names[-1])))}"


def make_item(item_id: str, row: Mapping[str, Any]) -> Item:
    if "text" in row:
        return _of_text(item_id, text(row, "text"))
    listed = next((name for name in ("messages", "conversations") if name in row), None)
    if listed:
        return _of_messages(item_id, listed, row)
    turns: list[tuple[str, str]] = []
    if "instruction" in row:
        prompt = instruct.prompt_of(text(row, "instruction"), optional_text(row, "input"))
        answer = text(row, "output")
        turns = _history(row.get("history"))
    else:
        prompt, answer = text(row, "prompt"), text(row, "completion")
    return _item(item_id, optional_text(row, "system"), [*turns, (prompt, answer)])


def _item(item_id: str, system: str, turns: Sequence[tuple[str, str]], unanswered: str = "") -> Item:
    *before, (prompt, answer) = turns
    truth = {"answer": answer, **({"unanswered": unanswered} if unanswered else {})}
    return Item(item_id, NAME, prompt, answer, truth, turns=tuple(before), system=system or None)


def _of_text(item_id: str, whole: str) -> Item:
    """Divided at the blank that is nearest to the middle."""
    if len(whole) < 2:
        raise RowError("text", f"expected a text of two characters or more, got {whole!r}")
    middle = len(whole) // 2
    blanks = [found.start() for found in re.finditer(r"(?<=\S)\s", whole)]
    at = min(blanks, key=lambda place: abs(place - middle), default=middle)
    return Item(item_id, NAME, whole[:at], whole[at:], {"answer": whole[at:].strip()}, whole=True)


def _parsed(name: str, value: Any) -> Any:
    """A list as it is, or as JSON in a cell of a CSV file."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(name, f"expected a list in JSON, got broken JSON ({error})") from error
    return value


def _history(value: Any) -> list[tuple[str, str]]:
    pairs = _parsed("history", value) or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RowError("history", f"expected a list of [question, answer], got {shown(pairs)}")
    return [
        (_content("history", f"question {n}", question), _content("history", f"answer {n}", answer))
        for n, (question, answer) in enumerate(pairs, start=1)
    ]


def _of_messages(item_id: str, name: str, row: Mapping[str, Any]) -> Item:
    messages = _parsed(name, row[name])
    if not isinstance(messages, list) or not messages:
        came = "nothing" if messages in (None, []) else shown(messages)
        raise RowError(name, f"expected {FIELDS[name].about}, got {came}")
    system, said = optional_text(row, "system"), list[tuple[str, str]]()
    for number, message in enumerate(messages, start=1):
        role, content = _message(name, f"turn {number}", message)
        if role == "system":
            if number > 1 or (system and content):
                there = "among the turns" if number > 1 else "beside that of field system"
                raise RowError(name, f"turn {number}: expected one system message, at the start, got one {there}")
            system = system or content
        elif said and said[-1][0] == role:
            other = "an answer" if role == "user" else "a question"
            raise RowError(name, f"turn {number}: expected {other}, got two {role} turns in a row")
        elif not said and role == "assistant":
            raise RowError(name, f"turn {number}: expected a user turn first, got an assistant turn")
        else:
            said.append((role, content))
    unanswered = said.pop()[1] if said and said[-1][0] == "user" else ""
    if not said:
        raise RowError(name, "expected an assistant turn, got none")
    turns = [(said[n][1], said[n + 1][1]) for n in range(0, len(said), 2)]
    return _item(item_id, system, turns, unanswered)


def _message(name: str, where: str, message: Any) -> tuple[str, str]:
    """Its role (system, user or assistant) and what it says."""
    if not isinstance(message, dict):
        raise RowError(name, f"{where}: expected {{role, content}} or {{from, value}}, got {shown(message)}")
    role, content = (next((message[key] for key in keys if message.get(key) is not None), None)
                     for keys in (("role", "from"), ("content", "value")))  # fmt: skip
    if role in _TOOLS or any(message.get(key) for key in ("tool_calls", "function_call")):
        raise RowError(name, f"{where}: {_NO_TOOLS}")
    plain = _ROLES.get(str(role).casefold())
    if plain is None:
        raise RowError(name, f"{where}: expected a role, got {shown(role)}{suggest(str(role), _ROLES)}")
    if message.get("weight") not in (None, 1):
        raise RowError(name, f"{where}: expected weight 1, since every answer is learnt, got {message['weight']!r}")
    return plain, _content(name, f"{where} ({role})", content, empty=plain == "system")


def _content(name: str, where: str, content: Any, empty: bool = False) -> str:
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if other := [str(part.get("type")) for part in parts if part.get("type") != "text"]:
            raise RowError(
                name, f"{where}: expected parts of text, got {', '.join(other)}; the task {NAME} is text alone"
            )
        content = "\n".join(str(part.get("text") or "") for part in parts)
    try:
        return (optional_text if empty else text)({"content": content}, "content")
    except RowError as error:
        raise RowError(name, f"{where}: {error.problems[0][1]}") from error


def complete(items: Sequence[Item]) -> list[str]:
    lost = sum("unanswered" in item.truth for item in items)
    longer = sum(bool(item.turns) for item in items)
    said = [f"{longer} of {len(items)} conversations have several turns; each answer in them is learnt."] * (longer > 0)
    return said + [f"{lost} conversations end with a question; it is left out, since nobody answers it."] * (lost > 0)


def group(item: Item) -> Hashable:
    """What a conversation begins with: parts of one are never in different splits. A text stands for itself."""
    return digest(item.turns[0][0] if item.turns else str(item.asked) if item.whole else item.prompt)


score = score_text
summarize = partial(summarize_texts, name=NAME)
