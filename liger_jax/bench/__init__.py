"""What `liger-jax bench` measures: operations at the models' shapes, training, generation, and their peers."""
