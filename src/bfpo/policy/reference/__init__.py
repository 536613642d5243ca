"""Reference log-probs: where they come from, the pass that computes them, the cache that keeps them."""
