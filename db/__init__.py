"""Records of results, their archive in runs/, and the database that one command rebuilds from it."""

import sys
from importlib.util import find_spec

from db.errors import DatabaseError, FileError, OutputError, Problem

__all__ = ["DatabaseError", "FileError", "OutputError", "Problem"]

# Every command of the project imports this package first; while Python resolves `-m`, sys.argv[0] is "-m".
if sys.argv[:1] == ["-m"] and not all(map(find_spec, ("pydantic", "sqlalchemy", "typer"))):
    sys.exit("no environment: run `make setup`, then `. .venv/bin/activate`")
