"""The command ``axolotl-layersel``."""
