"""The command ``axolotl-layersel``, and the pictures that it draws."""
