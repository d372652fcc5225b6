"""Scripts that measure; see benchmarks/_harness.py."""

import db as db  # which says what to do where there is no environment
