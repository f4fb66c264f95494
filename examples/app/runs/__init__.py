"""What every program has, whatever it computes: command line, errors, processes, output folder, checkpoints."""
