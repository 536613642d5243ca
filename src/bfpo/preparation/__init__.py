"""Data that people have -> data to train on: mixed, checked, cleaned, split by prompt, with a card and a manifest."""
