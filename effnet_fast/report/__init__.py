"""Curves, Pareto fronts, confusion matrices, tables and pages of results."""
