"""Training: turns batches into a trained model."""
