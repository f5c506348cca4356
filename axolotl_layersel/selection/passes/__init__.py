"""From samples to measurements: forward and backward passes, one layer at a time where it must be."""
