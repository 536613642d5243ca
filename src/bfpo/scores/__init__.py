"""Scores with intervals from verdicts and margins, and comparisons of models."""
