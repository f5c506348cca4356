"""The beginning of the line that a refusal ends in, and a part of the block that only a finished run ends in."""

PREFIX = "axolotl-layersel: "
CLOSING = "  merge         axolotl merge-lora "
