"""Batches in, a trained model out."""
