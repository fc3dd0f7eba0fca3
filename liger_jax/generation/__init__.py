"""Prompts in; tokens, then text, out."""
