"""The stages on the shapes world, which needs no download."""
