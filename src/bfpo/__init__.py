"""Bi-Factorial Preference Optimization: align language models to be helpful and safe with one supervised loss."""
