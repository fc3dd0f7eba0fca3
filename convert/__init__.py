"""Hugging Face weights to this model and back."""

from convert.reader import from_hf
from convert.writer import to_hf, to_hf_state

__all__ = ["from_hf", "to_hf", "to_hf_state"]
