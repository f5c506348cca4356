"""The report of ``axolotl-layersel doctor``: what a YAML file will do, from the configuration of its model."""
