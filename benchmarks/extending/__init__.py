"""The parts of `extension.py`: its arms, its material, the training, what is measured, and how that is shown."""

import sys

from environment import ROOT

sys.path.append(str(ROOT / "examples"))  # of which the parts are used that programs have
