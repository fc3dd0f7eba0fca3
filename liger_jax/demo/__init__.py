"""`liger-jax demo`: fine-tunes a small Qwen2-VL on handwritten digits and asks it about digits it has not seen."""
