"""Benchmarks: whole training loops against TRL, how a step scales, and what comes before the first step."""
