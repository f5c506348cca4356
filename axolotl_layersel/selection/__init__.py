"""Choosing the layers that get an adapter, and the rank of each module."""
