"""The trainer, its metrics and checks, and a training run in its folder: checkpoints, resume, the saved model."""
