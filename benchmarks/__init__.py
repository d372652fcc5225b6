"""Scripts that measure; see benchmarks/_harness.py."""
