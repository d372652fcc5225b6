"""The views that revision 0002 adds; those of 0001 stay as they are."""

from __future__ import annotations

# Accuracies and shares in percent, the difference in percentage points, sizes in millions of bytes.
QUANTIZATION = """
CREATE VIEW v_quantization AS
SELECT
    run.id AS run_id,
    run.arm,
    run.seed,
    run.model_name,
    quantization.type,
    CAST(quantization.bytes AS DOUBLE PRECISION) / 1e6 AS megabytes,
    quantization.bits_per_weight,
    100.0 * quantization.category_accuracy AS aqi_accuracy,
    100.0 * (quantization.category_accuracy - reference.category_accuracy) AS delta_f16,
    100.0 * quantization.answers_equal_to_f16 AS answers_equal_to_f16,
    quantization.n,
    quantization.fallbacks
FROM run
JOIN quantization ON quantization.run_id = run.id
LEFT JOIN quantization AS reference ON reference.run_id = run.id AND reference.type = 'f16'
WHERE run.is_current AND run.status = 'finished'
"""

VERIFICATION = """
CREATE VIEW v_verification AS
SELECT
    run.id AS run_id,
    run.arm,
    run.seed,
    run.model_name,
    verification.backend,
    verification.backend_version,
    verification.mode,
    verification.prompts,
    100.0 * verification.rendered AS rendered,
    100.0 * verification.counted AS counted,
    100.0 * verification.answered AS answered,
    100.0 * verification.equal_to_merged AS equal_to_merged,
    verification.perturbed_noticed,
    verification.first_difference
FROM run
JOIN verification ON verification.run_id = run.id
WHERE run.is_current AND run.status = 'finished'
"""

NAMES = ("v_verification", "v_quantization")
"""In the order in which they can be dropped."""

STATEMENTS = (QUANTIZATION, VERIFICATION)
