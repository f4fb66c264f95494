"""What every run has, whatever it computes: its processes, its output folder, its checkpoints, its manifest."""
