"""Scores, their intervals, and the report."""
