"""WORKER: the machine's best float32 matrix rate, in a process of its own with the threads that training has."""

from __future__ import annotations

from benchmarks.machine import best_matrix_rate
from benchmarks.process import worker

if __name__ == "__main__":
    worker(lambda _values: {"rates": best_matrix_rate()})
