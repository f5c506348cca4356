"""Choosing layers: one file a method, ``passes`` to run the model, ``phase`` to decide and apply."""
