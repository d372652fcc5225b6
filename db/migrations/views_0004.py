"""The views of revision 0004: of other tasks those that show AQI have no accuracy; two new ones show every task."""

from __future__ import annotations

from db.migrations import views_0001, views_0002

# Document 004's columns are about AQI: runs of other tasks have none of it, not even the base's difference of zero.
LEADERBOARD = views_0001.LEADERBOARD.replace(
    "    100.0 * aqi.value AS aqi_accuracy,\n    CASE WHEN run.arm = 'base'",
    "    CASE WHEN run.task = 'aqi' THEN 100.0 * aqi.value END AS aqi_accuracy,\n"
    "    CASE WHEN run.task <> 'aqi' THEN NULL WHEN run.arm = 'base'",
)

QUANTIZATION = views_0002.QUANTIZATION.replace(
    "100.0 * quantization.category_accuracy AS aqi_accuracy",
    "CASE WHEN run.task = 'aqi' THEN 100.0 * quantization.category_accuracy END AS aqi_accuracy",
).replace(
    "100.0 * (quantization.category_accuracy - reference.category_accuracy) AS delta_f16",
    "100.0 * (quantization.credit - reference.credit) AS delta_f16",
)

# One row for each finished run of any task. `value` is the primary metric in percent, differences are percentage
# points, speeds decode tokens per second (see 0001). Of each task's arm and seed one run is the latest, of those with
# the base model of the task's newest run (or an unknown one), and the settings and data of training of the arm's
# newest with it.
TASK_RESULTS = """
CREATE VIEW task_results AS
WITH decode AS (
    SELECT run_id, arm, 1e9 * CAST(SUM(tokens) AS DOUBLE PRECISION) / NULLIF(SUM(nanoseconds), 0) AS rate
    FROM speed
    WHERE phase = 'decode' AND tokens IS NOT NULL AND nanoseconds IS NOT NULL
    GROUP BY run_id, arm
),
final AS (
    SELECT run_id, name, split, value, n FROM metric WHERE step = -1
),
finished AS (
    SELECT id, task, arm, seed, ended, base_key, train_key,
        FIRST_VALUE(base_key) OVER (PARTITION BY task ORDER BY base_key = '', ended DESC, id DESC)
            AS newest_base
    FROM run
    WHERE status = 'finished'
),
of_base AS (
    SELECT id, task, arm, seed, ended, train_key,
        FIRST_VALUE(train_key) OVER (PARTITION BY task, arm ORDER BY ended DESC, id DESC) AS newest_key
    FROM finished
    WHERE base_key IN (newest_base, '')
),
ordered AS (
    SELECT id, ROW_NUMBER() OVER (PARTITION BY task, arm, seed ORDER BY ended DESC, id DESC) AS place
    FROM of_base
    WHERE train_key = newest_key
)
SELECT
    run.id AS run_id,
    run.task,
    run.task_title,
    run.primary_metric AS metric,
    metric_def.direction,
    run.model_name,
    run.arm,
    run.seed,
    100.0 * own.value AS value,
    CASE WHEN run.arm = 'base' THEN 0.0 ELSE 100.0 * (own.value - base.value) END AS delta_base,
    own.n,
    100.0 * retention.value AS retention_accuracy,
    CASE WHEN run.arm = 'base' THEN 0.0 ELSE 100.0 * (retention.value - base_retention.value) END
        AS delta_retention,
    speed.rate AS inference_speed,
    CASE WHEN run.arm = 'base' THEN 0.0 ELSE speed.rate - beside.rate END AS delta_speed,
    run.is_current,
    COALESCE(ordered.place, 0) = 1 AS is_latest,
    run.test_items_sha256,
    {timestamp} AS timestamp
FROM run
LEFT JOIN ordered ON ordered.id = run.id
LEFT JOIN metric_def ON metric_def.name = run.primary_metric
LEFT JOIN final AS own
    ON own.run_id = run.id AND own.name = run.primary_metric AND own.split = 'test'
LEFT JOIN final AS base
    ON base.run_id = run.reference_run_id AND base.name = run.primary_metric AND base.split = 'test'
LEFT JOIN final AS retention
    ON retention.run_id = run.id AND retention.name = 'retention_accuracy' AND retention.split = 'retention'
LEFT JOIN final AS base_retention
    ON base_retention.run_id = run.reference_run_id AND base_retention.name = 'retention_accuracy'
    AND base_retention.split = 'retention'
LEFT JOIN decode AS speed ON speed.run_id = run.id AND speed.arm = run.arm
LEFT JOIN decode AS beside ON beside.run_id = run.id AND beside.arm = 'base'
WHERE run.status = 'finished'
"""

# The same for each precision of each of these runs.
TASK_QUANTIZATION = """
CREATE VIEW task_quantization AS
SELECT
    run.id AS run_id,
    run.task,
    run.task_title,
    run.primary_metric AS metric,
    run.model_name,
    run.arm,
    run.seed,
    quantization.type,
    CAST(quantization.bytes AS DOUBLE PRECISION) / 1e6 AS megabytes,
    quantization.bits_per_weight,
    100.0 * quantization.credit AS value,
    100.0 * (quantization.credit - reference.credit) AS delta_f16,
    100.0 * quantization.answers_equal_to_f16 AS answers_equal_to_f16,
    quantization.n,
    quantization.fallbacks,
    run.is_current
FROM run
JOIN quantization ON quantization.run_id = run.id
LEFT JOIN quantization AS reference ON reference.run_id = run.id AND reference.type = 'f16'
WHERE run.status = 'finished'
"""

NAMES = ("task_quantization", "task_results")
"""Those that are new."""


def statements(dialect: str) -> list[str]:
    """Return the CREATE VIEW statements in order; other dialects get PostgreSQL's."""
    timestamp = views_0001.TIMESTAMP.get(dialect, views_0001.TIMESTAMP["postgresql"])
    with_time = [text.replace("{timestamp}", timestamp) for text in (views_0001.EVALUATION_RESULTS, TASK_RESULTS)]
    return [LEADERBOARD, with_time[0], QUANTIZATION, with_time[1], TASK_QUANTIZATION]
