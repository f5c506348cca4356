"""ending"""

PREFIX = "axolotl-layersel: "
