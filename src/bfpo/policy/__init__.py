"""The model: loading, log-probs, the frozen reference."""
