"""Projection budgets."""
