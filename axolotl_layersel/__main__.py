"""``python -m axolotl_layersel``: the command, if its script is not on the path."""

from axolotl_layersel.cli.main import command

if __name__ == "__main__":
    command()
