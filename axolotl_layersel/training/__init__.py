"""A run's life: its checks, checkpoints, signals and nodes, from the trainer to the last file."""
