"""How good a model is: a file for each benchmark, pure functions over a loaded model."""
