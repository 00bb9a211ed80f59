"""What people type: `python -m launch.<command>`, thin around the library."""
