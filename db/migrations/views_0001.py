"""The views of revision 0001, in SQL that SQLite and PostgreSQL both read: current, finished runs only."""

from __future__ import annotations

# Accuracies are percent, their differences percentage points, speeds decode tokens per second. A rate is the
# sum of tokens over the sum of time: means of rates would let short repetitions count as much as long ones.
LEADERBOARD = """
CREATE VIEW v_leaderboard AS
WITH decode AS (
    SELECT run_id, arm, 1e9 * CAST(SUM(tokens) AS DOUBLE PRECISION) / NULLIF(SUM(nanoseconds), 0) AS rate
    FROM speed
    WHERE phase = 'decode' AND tokens IS NOT NULL AND nanoseconds IS NOT NULL
    GROUP BY run_id, arm
),
final AS (
    SELECT run_id, name, split, value FROM metric WHERE step = -1
)
SELECT
    run.id AS run_id,
    run.arm,
    run.seed,
    run.model_name,
    100.0 * aqi.value AS aqi_accuracy,
    CASE WHEN run.arm = 'base' THEN 0.0 ELSE 100.0 * (aqi.value - base_aqi.value) END AS delta_aqi,
    100.0 * retention.value AS retention_accuracy,
    CASE WHEN run.arm = 'base' THEN 0.0 ELSE 100.0 * (retention.value - base_retention.value) END
        AS delta_retention,
    own.rate AS inference_speed,
    CASE WHEN run.arm = 'base' THEN 0.0 ELSE own.rate - beside.rate END AS delta_speed,
    100.0 * token_ids.value AS token_ids_equal,
    100.0 * greedy.value AS greedy_equal,
    run.backend_name,
    run.device_class,
    run.git_commit,
    run.git_dirty,
    run.started,
    run.ended
FROM run
LEFT JOIN final AS aqi
    ON aqi.run_id = run.id AND aqi.name = 'aqi_category_accuracy' AND aqi.split = 'test'
LEFT JOIN final AS base_aqi
    ON base_aqi.run_id = run.reference_run_id AND base_aqi.name = 'aqi_category_accuracy'
    AND base_aqi.split = 'test'
LEFT JOIN final AS retention
    ON retention.run_id = run.id AND retention.name = 'retention_accuracy'
    AND retention.split = 'retention'
LEFT JOIN final AS base_retention
    ON base_retention.run_id = run.reference_run_id AND base_retention.name = 'retention_accuracy'
    AND base_retention.split = 'retention'
LEFT JOIN final AS token_ids
    ON token_ids.run_id = run.id AND token_ids.name = 'token_ids_equal' AND token_ids.split = 'parity'
LEFT JOIN final AS greedy
    ON greedy.run_id = run.id AND greedy.name = 'greedy_equal' AND greedy.split = 'parity'
LEFT JOIN decode AS own ON own.run_id = run.id AND own.arm = run.arm
LEFT JOIN decode AS beside ON beside.run_id = run.id AND beside.arm = 'base'
WHERE run.is_current AND run.status = 'finished'
"""

# The six columns that document 004 names, one row for each current run.
EVALUATION_RESULTS = """
CREATE VIEW evaluation_results AS
SELECT
    model_name,
    aqi_accuracy,
    delta_aqi,
    inference_speed,
    delta_speed,
    {timestamp} AS timestamp
FROM v_leaderboard
"""

TIMESTAMP = {
    "sqlite": "replace(ended, ' ', 'T') || '+00:00'",
    "postgresql": """to_char(ended AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')""",
}

PROBE_SUMMARY = """
CREATE VIEW v_probe_summary AS
SELECT
    run.id AS run_id,
    run.arm,
    run.seed,
    run.model_name,
    probe.name AS probe,
    COUNT(*) AS readings,
    COUNT(DISTINCT probe.layer) AS layers,
    SUM(CASE WHEN probe.verdict = 'pass' THEN 1 ELSE 0 END) AS passed,
    SUM(CASE WHEN probe.verdict = 'fail' THEN 1 ELSE 0 END) AS failed,
    SUM(CASE WHEN probe.value_kind <> 'finite' THEN 1 ELSE 0 END) AS not_finite,
    MIN(probe.value) AS lowest,
    MAX(probe.value) AS highest,
    CASE
        WHEN SUM(CASE WHEN probe.verdict = 'fail' THEN 1 ELSE 0 END) > 0 THEN 'fail'
        WHEN SUM(CASE WHEN probe.verdict = 'pass' THEN 1 ELSE 0 END) = COUNT(*) THEN 'pass'
        ELSE 'inconclusive'
    END AS verdict
FROM run
JOIN probe ON probe.run_id = run.id
WHERE run.is_current AND run.status = 'finished'
GROUP BY run.id, run.arm, run.seed, run.model_name, probe.name
"""

# One row for each pair of ways to run the same adapter; 'all' is every way at once.
PARITY = """
CREATE VIEW v_parity AS
SELECT
    run.id AS run_id,
    run.arm,
    run.seed,
    run.model_name,
    CASE WHEN metric.name = 'greedy_equal' THEN 'all' ELSE substr(metric.name, 6) END AS pair,
    100.0 * metric.value AS greedy_equal,
    100.0 * token_ids.value AS token_ids_equal,
    metric.n AS prompts
FROM run
JOIN metric ON metric.run_id = run.id AND metric.split = 'parity' AND metric.step = -1
    AND (metric.name = 'greedy_equal' OR metric.name LIKE 'pair/%')
LEFT JOIN metric AS token_ids
    ON token_ids.run_id = run.id AND token_ids.split = 'parity' AND token_ids.step = -1
    AND token_ids.name = 'token_ids_equal'
WHERE run.is_current AND run.status = 'finished'
"""

NAMES = ("v_parity", "v_probe_summary", "evaluation_results", "v_leaderboard")
"""In the order in which they can be dropped."""


def statements(dialect: str) -> list[str]:
    """Return the CREATE VIEW statements in order; other dialects get PostgreSQL's."""
    timestamp = TIMESTAMP.get(dialect, TIMESTAMP["postgresql"])
    return [LEADERBOARD, EVALUATION_RESULTS.replace("{timestamp}", timestamp), PROBE_SUMMARY, PARITY]
