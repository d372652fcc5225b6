"""Paired statistics as pure functions of arrays: intervals, tests, seeds and items as two levels, power."""
