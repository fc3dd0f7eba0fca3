"""Turns files of conversations into a stream of batches."""
