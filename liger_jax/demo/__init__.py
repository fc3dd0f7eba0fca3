"""`liger-jax demo`: trains a small Qwen-VL model on handwritten digits and asks it about digits it has not seen."""
