"""Conversation files become a stream of batches."""
