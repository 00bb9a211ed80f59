"""Rewards: pictures in, scores out. NumPy and Pillow alone, never JAX."""
