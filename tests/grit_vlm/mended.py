"""The calls of the documents that cannot be made as they are written, each tied to the test that makes the mended one.

A test says what it mends by the decorator `mended`; the call named there has to be in the test's own code. The table in
docs/grit_vlm.md is made of it: `python tests/grit_vlm/test_documents.py` writes it anew.
"""

import ast
import inspect
import re
import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Mended:
    """One call.

    Attributes:
        document: 000, 001 or 003.
        written: As the document has it.
        here: As the test makes it.
        why: What was wrong.
        test: That makes it.
    """

    document: str
    written: str
    here: str
    why: str
    test: str

    def row(self):
        return f"| {self.document} | `{self.written}` | `{self.here}` | {self.why} |"


MENDED = []


def mended(written, here, why):
    """Mark a test as one that makes the call `here` in the place of `written`."""

    def mark(test):
        document = re.search(r"document_(\d{3})", test.__module__)[1]
        assert test.__name__.startswith("test_"), "only what pytest collects is run"
        assert _normal(here) in _body(test), f"{test.__name__} does not make the call {here}"
        MENDED.append(Mended(document, written, here, why, test.__name__))
        return test

    return mark


def _normal(code):
    return ast.unparse(ast.parse(code))


def _body(test):
    """A test's code without its decorators, in ast's own spelling."""
    [function] = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(test)))).body
    function.decorator_list = []
    return ast.unparse(function)
