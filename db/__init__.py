"""Records of results, their archive in runs/, and the database that is derived from it and rebuilt by one command."""

from db.errors import DatabaseError, DatabaseMissingError, IngestError, Problem, SchemaVersionError

__all__ = ["DatabaseError", "DatabaseMissingError", "IngestError", "Problem", "SchemaVersionError"]
