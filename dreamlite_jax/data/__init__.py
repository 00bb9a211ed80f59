"""Everything that happens to data on the host: NumPy and Grain only, never jax."""
