"""Several commands as one experiment: chains of steps that run in parallel and can be resumed."""
