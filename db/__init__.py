"""The database of results: derived from the JSON beside the artefacts, deletable, rebuilt by one command."""

from db.errors import DatabaseError, DatabaseMissingError, IngestError, Problem, SchemaVersionError
from db.session import open_session

__all__ = [
    "DatabaseError",
    "DatabaseMissingError",
    "IngestError",
    "Problem",
    "SchemaVersionError",
    "open_session",
]
