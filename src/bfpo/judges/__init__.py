"""Judges of completions and pairs, their prompts, their votes, and how far each can be trusted."""
