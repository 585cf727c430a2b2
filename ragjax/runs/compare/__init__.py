"""Comparing systems: answers, measures, robustness, results."""
