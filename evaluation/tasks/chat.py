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
from contextlib import suppress
from functools import partial
from itertools import chain, cycle
from typing import Any

from evaluation import EvaluationError
from evaluation.marks import NOT_LEARNED, is_empty, learns, mark_of
from evaluation.tasks import Field, Item, RowError, brief, digest, instruct, optional_text, text
from trainers.words import as_written, suggest

NAME = "chat"
TITLE = "Chat ROUGE-L"
PRIMARY = "chat_rouge_l"
METRICS = instruct.text_metrics(NAME)
MARKED_TURNS = True
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
        answer = "chosen" if "chosen" in columns else "answer"
        raise EvaluationError(
            f"expected the columns of one form ({known}), got {', '.join(columns) or 'none'}; {advice} "
            f"{{messages: dialogue}} or {{prompt: question, completion: {answer}}}."
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
    marks = row.get("marks", {})
    if "text" in row:
        for name in marks:
            raise RowError(name, f"expected true or false, since a text has no turns, got {brief(marks[name])}")
        return _of_text(item_id, text(row, "text"))
    field = next((name for name in ("messages", "conversations", "history") if name in row), None)
    try:
        system, turns, unanswered = _conversation(_messages(row), optional_text(row, "system"), marks)
    except RowError:
        raise
    except ValueError as error:
        raise RowError(field, str(error)) from error
    last = max((place for place, turn in enumerate(turns) if turn[2]), default=None)
    if last is None:
        raise RowError(None, f"{NOT_LEARNED}no answer is marked as learned")
    (prompt, answer, _), before = turns[last], turns[:last]
    # Many tokenizers would make one token of a template's last line break and those that an earlier answer begins with.
    plain = tuple((question, _BLANK_LINES.sub("", earlier)) for question, earlier, _ in before)
    given = tuple(place for place, (_, _, learned) in enumerate(before) if not learned)
    told = {
        "unanswered": unanswered,
        "blank_lines": any(earlier != kept for (_, earlier, _), (_, kept) in zip(before, plain, strict=True)),
        "unlearned": len(given) + len(turns) - 1 - last,
    }
    truth = {"answer": answer, **{name: value for name, value in told.items() if value}}
    return Item(item_id, NAME, prompt, answer, truth, turns=plain, given=given, system=system or None)


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


def _messages(row: Mapping[str, Any]) -> list[Any]:
    """A row of any form with turns as messages."""
    if field := next((name for name in ("messages", "conversations") if name in row), None):
        messages = _parsed(row[field])
        if not isinstance(messages, list) or not messages:
            got = "nothing" if messages in (None, []) else brief(messages)
            raise ValueError(f"expected {FIELDS[field].about}, got {got}")
        return messages
    pairs = _parsed(row.get("history")) or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"expected a list of [question, answer], got {brief(pairs)}")
    if "instruction" in row:
        last = [instruct.join_input(text(row, "instruction"), optional_text(row, "input")), text(row, "output")]
    else:
        last = [text(row, "prompt"), text(row, "completion")]
    roles = cycle(("user", "assistant"))
    return [{"role": role, "content": content} for role, content in zip(roles, chain(*pairs, last), strict=False)]


def _conversation(
    messages: list[Any], system: str, marks: Mapping[str, Sequence[object]]
) -> tuple[str, list[tuple[str, str, bool]], str]:
    """(system message, turns of question, answer and whether it is learned, a last question without an answer)."""
    spoken: list[tuple[str, str, bool]] = []
    for number, (message, more) in enumerate(zip(messages, _by_turn(messages, marks), strict=True), start=1):
        where = f"turn {number}"
        role, content, learned = _message(where, message, more)
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
            spoken.append((role, content, learned))
    unanswered = spoken.pop()[1] if spoken and spoken[-1][0] == "user" else ""
    if not spoken:
        raise ValueError("expected an assistant turn, got none")
    pairs = zip(spoken[::2], spoken[1::2], strict=True)
    return system, [(question, answer, learned) for (_, question, _), (_, answer, learned) in pairs], unanswered


def _by_turn(messages: list[Any], marks: Mapping[str, Sequence[object]]) -> list[dict[str, object]]:
    """The marks of each turn; a column has one for every turn, or for every answer."""
    turns = [dict[str, object]() for _ in messages]
    answers = [turn for turn, message in zip(turns, messages, strict=True) if _role(message) == "assistant"]
    for name, values in marks.items():
        marked = answers if len(values) == len(answers) else turns
        if len(values) != len(marked):
            wanted = f"{len(turns)} values, one a turn, or {len(answers)}, one an answer"
            raise RowError(name, f"expected {wanted}, got {len(values)}")
        for turn, value in zip(marked, values, strict=True):
            turn[name] = value
    return turns


def _role(message: Any) -> str | None:
    """system, user or assistant; None if it is none of them."""
    return _ROLES.get(str(message.get(_keys(message)[0])).casefold()) if isinstance(message, dict) else None


def _message(where: str, message: Any, marks: Mapping[str, object]) -> tuple[str, str, bool]:
    """Role, content, and whether it is learned."""
    if not isinstance(message, dict):
        raise ValueError(f"{where}: expected {{role, content}} or {{from, value}}, got {brief(message)}")
    (given, content), role = (message.get(key) for key in _keys(message)), _role(message)
    if given in _TOOLS or any(message.get(key) for key in ("tool_calls", "function_call")):
        raise ValueError(f"{where}: tool calls are not supported yet")
    if role is None:
        raise ValueError(f"{where}: expected a role, got {brief(given)}{suggest(str(given), _ROLES)}")
    where = f"{where} ({given})"
    try:
        learned = learns({**message, **marks}, role == "assistant")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return role, _content(where, content, empty=role == "system"), learned


def _keys(message: Mapping[str, Any]) -> list[str]:
    """The keys under which a turn has its role and its content."""
    pairs = ("role", "from"), ("content", "value")
    return [next((key for key in keys if message.get(key) is not None), keys[0]) for keys in pairs]


def unread(row: Mapping[str, Any]) -> set[str]:
    """The keys of a row's turns that say something and are not read."""
    with suppress(ValueError):
        turns = [message for message in _messages(row) if isinstance(message, dict)]
        said = ({key for key, value in turn.items() if not is_empty(value)} - {*_keys(turn)} for turn in turns)
        return {f"{key} of turns" for keys in said for key in keys if mark_of(key) is None}
    return set()


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
    unlearned = [item.truth["unlearned"] for item in items if "unlearned" in item.truth]
    if unlearned:
        notes.append(
            f"{sum(unlearned)} answers in {len(unlearned)} conversations are marked as not to be learned: the model is "
            "shown them, or, at the end of a conversation, they are dropped."
        )
    return notes + [f"Empty lines before earlier answers are left out in {blank} conversations."] * (blank > 0)


def group(item: Item) -> Hashable:
    """The questions of a conversation, so that parts of one are never in different splits. A text is its own group."""
    if item.whole:
        return digest(str(item.context))
    return tuple(map(digest, [*(question for question, _ in item.turns), item.prompt]))


score = instruct.score_text
summarize = partial(instruct.summarize_texts, name=NAME)
