"""Choosing layers before training: ``select`` decides and applies, ``methods`` holds a file for each method."""
