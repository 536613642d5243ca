"""From a row on disk to a batch."""
