"""The report as Markdown; cells may hold anything, a model's own words too."""

import html
import re
from collections.abc import Iterable, Sequence

from evaluation.report.blocks import Block, Cell, Details, Section, Table, Text
from evaluation.report.comparison import Comparison
from evaluation.report.provenance import byline
from evaluation.report.sections import TITLE, sections

_BOUNDS = r"\[[-+\d., %]+\](?![(\[:])"
"""Numbers in brackets that no link follows, such as an interval."""
_INNER_UNDERSCORE = r"(?<=[^\W_])_(?=[^\W_])"
"""Within a word, as in a model's name, it means nothing to Markdown."""
_SPECIAL = re.compile(rf"{_BOUNDS}|{_INNER_UNDERSCORE}|(?P<escaped>[\\`*_\[\]|~])")


def as_markdown(comparison: Comparison) -> str:
    return "\n\n".join([f"# {TITLE}", escaped(byline(comparison)), *laid_out(sections(comparison))]) + "\n"


def laid_out(chapters: Iterable[Section]) -> Iterable[str]:
    for section in chapters:
        blocks = list(_blocks(section.blocks))
        yield from [f"## {escaped(section.title)}", *blocks] if blocks else []


def escaped(text: object) -> str:
    """One line that shows the text as it is: no markup, no HTML, no link, no end of its cell."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return _SPECIAL.sub(lambda match: f"\\{match[0]}" if match["escaped"] else match[0], line)


def grid(headers: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [list(map(escaped, row)) for row in (headers, *lines)]
    rows.insert(1, ["---"] * len(headers))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _blocks(blocks: Iterable[Block]) -> Iterable[str]:
    for block in blocks:
        if isinstance(block, Text):
            yield f"- {escaped(block.text)}" if block.style == "note" else escaped(block.text)
        elif isinstance(block, Table):
            yield f"{escaped(block.caption)}:"
            yield grid(block.headers, [list(map(_words, row)) for row in block.rows])
        elif isinstance(block, Details):
            inner = list(_blocks(block.blocks))
            yield from [f"### {escaped(block.summary)}", *inner] if inner else []


def _words(cell: Cell) -> str:
    hint = "; ".join(cell.hint.splitlines())
    return f"{cell.text} ({hint})" if hint else cell.text
