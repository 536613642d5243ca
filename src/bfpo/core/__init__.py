"""Basics that every package may use: errors, data records, files, provenance, YAML, console, progress."""
