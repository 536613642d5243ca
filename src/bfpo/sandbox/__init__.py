"""A small closed world with exact oracles, the demo on it, and the four-action experiment."""
