"""From verdicts and margins to scores with intervals, and comparisons of models."""
