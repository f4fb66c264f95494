"""What every program has, whatever it computes: command line, errors, processes, folders, checkpoints, versions."""
