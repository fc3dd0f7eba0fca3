"""Converts Hugging Face checkpoints and PEFT adapters to this model and back."""

from convert.adapter import load_adapter, save_adapter
from convert.load import open_model
from convert.reader import from_hf
from convert.writer import to_hf, to_hf_state

__all__ = ["from_hf", "load_adapter", "open_model", "save_adapter", "to_hf", "to_hf_state"]
