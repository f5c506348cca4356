"""The comparison of adapters, ranks and learning rates on a user's own run, each trained by ``axolotl train``."""
