"""What `liger-jax bench` measures: operations of pallas_kernels at the models' shapes, and their peers."""
