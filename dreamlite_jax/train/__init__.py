"""Training: one update, one loop, its checkpoints and what it reports."""
