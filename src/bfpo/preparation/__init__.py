"""Prepare training data: mix sources, check and clean rows, split by prompt; with a data card and a manifest."""
