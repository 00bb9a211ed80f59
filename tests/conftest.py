"""Lets tests import what they share: commands here, reference in parity/."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "parity")]
