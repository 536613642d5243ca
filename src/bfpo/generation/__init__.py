"""Sampling completions with transformers, with vLLM, or from a server."""
