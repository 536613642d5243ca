"""Judges of completions and pairs, their prompts, their votes, and their agreement with people."""
