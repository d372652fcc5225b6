"""Records of results, their archive in runs/, and the database that is derived from it and rebuilt by one command."""

import sys
from importlib.util import find_spec

from db.errors import DatabaseError, DatabaseMissingError, IngestError, Problem, SchemaVersionError

__all__ = ["DatabaseError", "DatabaseMissingError", "IngestError", "Problem", "SchemaVersionError"]

# Every command of the project imports this package before any other; -m is what Python has there while it does so.
if sys.argv[:1] == ["-m"] and not all(map(find_spec, ("pydantic", "sqlalchemy", "typer"))):
    sys.exit("no environment: run `make setup`, then `. .venv/bin/activate`")
