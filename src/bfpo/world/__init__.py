"""The closed world: prompts, completions, and the oracle that reads them."""
