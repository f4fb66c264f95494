"""The parts of `extension.py`: its arms, its material, the training, what is measured, and how that is shown."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples"))  # of which the parts are used that programs have
