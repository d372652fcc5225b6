"""The view that revision 0003 adds; those of 0001 and 0002 stay as they are."""

from __future__ import annotations

# `last_…` is of the newest start; of starts at the same moment the larger id counts, so that the answer is one.
ATTEMPTS = """
CREATE VIEW v_attempts AS
WITH ordered AS (
    SELECT
        stage,
        arm,
        seed,
        status,
        error,
        started,
        ROW_NUMBER() OVER (PARTITION BY stage, arm, seed ORDER BY started DESC, id DESC) AS place
    FROM attempt
)
SELECT
    stage,
    arm,
    seed,
    COUNT(*) AS starts,
    SUM(CASE WHEN status = 'finished' THEN 1 ELSE 0 END) AS finished,
    SUM(CASE WHEN status = 'failed' THEN 1 ELSE 0 END) AS failed,
    SUM(CASE WHEN status = 'crashed' THEN 1 ELSE 0 END) AS crashed,
    SUM(CASE WHEN status = 'running' THEN 1 ELSE 0 END) AS running,
    MAX(CASE WHEN place = 1 THEN status END) AS last_status,
    MAX(CASE WHEN place = 1 THEN error END) AS last_error,
    MAX(started) AS last_started
FROM ordered
GROUP BY stage, arm, seed
"""

NAMES = ("v_attempts",)
"""In the order in which they can be dropped."""

STATEMENTS = (ATTEMPTS,)
