"""Sampling completions: here, with vLLM, or from a server."""
