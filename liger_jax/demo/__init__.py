"""`liger-jax demo`: fine-tunes a small Qwen2-VL on handwritten digits and lets it answer questions about new ones."""
