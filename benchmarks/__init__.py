"""Scripts that measure; see benchmarks/harness.py."""
