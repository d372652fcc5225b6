"""Small helpers for files that are exported."""

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """Hash of a file's bytes, 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
