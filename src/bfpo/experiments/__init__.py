"""Several stages as one experiment: chains that run side by side and go on where they were cut off."""
