"""Benchmarks of the kernels and the model, and the tables made from their results: `python -m benchmarks`."""
