"""The beginning of the line that a refusal ends in."""

PREFIX = "axolotl-layersel: "
