"""From a model to completions and verdicts."""
