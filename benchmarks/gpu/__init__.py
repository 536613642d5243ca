"""The measurements on one GPU, of all that has none elsewhere; `python -m benchmarks.gpu`."""
