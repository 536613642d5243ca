"""The objective inside trainers of other libraries."""
