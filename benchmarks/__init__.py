"""Benchmarks of the operations and the model, and the tables made from their results: `python -m benchmarks`."""
