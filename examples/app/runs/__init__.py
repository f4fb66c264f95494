"""What every program has, whatever it computes: command line, processes, output folder, checkpoints, versions."""
