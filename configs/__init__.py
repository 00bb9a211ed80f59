"""Experiments: one file each, its docstring holds the command."""
