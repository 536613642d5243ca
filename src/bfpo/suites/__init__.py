"""Evaluation suites: prompts from files or the hub, answers, verdicts, scores."""
