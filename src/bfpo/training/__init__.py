"""The trainer, its metrics and checks, and the two training stages."""
