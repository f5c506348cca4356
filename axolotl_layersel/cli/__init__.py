"""The command ``axolotl-layersel``, and its plots of ranks and gates."""
