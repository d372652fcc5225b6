"""Schema migrations: numbered, append-only; a released one is never edited."""
