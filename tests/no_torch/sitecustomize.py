"""On PYTHONPATH, hides PyTorch from a process: importing it fails as if it were not installed."""

import sys

sys.modules["torch"] = None
