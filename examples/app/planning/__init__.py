"""The parts of `plan.py`: a training step without numbers, and what follows from it for each GPU."""
