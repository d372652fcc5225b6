"""Reads single result files into records, noting problems instead of stopping at the first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from db.errors import Problem

_LINES_SHOWN = 5
AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


@dataclass
class FileReader:
    """Collects problems and notes; every file that is read goes into the given digest."""

    root: Path
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, path: Path, key: str, message: str) -> None:
        """Note what is wrong in a file."""
        self.problems.append(Problem(path.relative_to(self.root).as_posix(), key, message))

    def unreadable(self, error: OSError) -> None:
        """Note a file or folder that the system does not let us read, once."""
        path = Path(error.filename or self.root)
        own = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)
        found = Problem(own, "", f"expected a file or folder that can be read, came: {error.strerror or error}")
        if found not in self.problems:
            self.problems.append(found)

    def text(self, path: Path, digest: hashlib._Hash, *, required: bool) -> bytes | None:
        """Return a file's bytes; a missing file is a problem only when it is required."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            if required:
                self.problem(path, "", "expected this file beside the others, came nothing")
            return None
        except OSError as error:
            self.unreadable(error)
            return None
        digest.update(f"{path.relative_to(self.root).as_posix()}\0{len(content)}\0".encode() + content)
        return content

    def record(
        self, path: Path, form: type[AnyRecord], digest: hashlib._Hash, *, required: bool = True
    ) -> AnyRecord | None:
        """Return a JSON file in its form, or None with its problems noted."""
        content = self.text(path, digest, required=required)
        return None if content is None else self.parsed(path, form, content)

    def parsed(self, path: Path, form: type[AnyRecord], content: bytes) -> AnyRecord | None:
        """Return the content of a JSON file in its form, or None with its problems noted."""
        try:
            return form.model_validate_json(content)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self.problem(path, ".".join(map(str, detail["loc"])), _words(detail))
        return None

    def lines(
        self,
        path: Path,
        form: type[AnyRecord],
        digest: hashlib._Hash,
        key: Callable[[AnyRecord], Hashable] | None = None,
        *,
        named: str = "item",
        required: bool = True,
    ) -> list[AnyRecord]:
        """Return the records of a JSON-lines file; of many bad lines only the first few are named.

        Args:
            path: The file.
            form: Of one line.
            digest: Updated with the file.
            key: What no two lines may share, last what it is called in messages; None: lines may repeat.
            named: What the key is of.
            required: A missing file is a problem.
        """
        content = self.text(path, digest, required=required) or b""
        records: list[AnyRecord] = []
        seen: set[Hashable] = set()
        bad = 0
        for number, line in enumerate(content.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                record = form.model_validate_json(line)
            except ValidationError as error:
                bad += 1
                if bad <= _LINES_SHOWN:
                    detail = error.errors(include_url=False)[0]
                    where = ".".join([f"line {number}", *map(str, detail["loc"])])
                    self.problem(path, where, _words(detail))
                continue
            if key is not None:
                own = key(record)
                if own in seen:
                    shown = own[-1] if isinstance(own, tuple) else own
                    self.problem(path, f"line {number}", f"{named} {shown} given more than once")
                seen.add(own)
            records.append(record)
        if bad > _LINES_SHOWN:
            self.problem(path, "", f"{bad - _LINES_SHOWN} more lines cannot be read")
        return records


def _words(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] in ("missing", "value_error", "json_invalid"):
        return message
    came = detail["input"]
    shown = came if isinstance(came, str) else json.dumps(came, default=str)
    return f"{message}, came {shown[:80]!r}" if isinstance(came, str) else f"{message}, came {shown[:80]}"
