"""Flexora (arXiv 2408.10774): a short search with one gate per layer says which layers need an adapter."""
