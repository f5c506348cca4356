"""The versions of the packages that a run depends on."""

import importlib.metadata

RECORDED = ("axolotl-layersel", "axolotl", "torch", "transformers", "peft")


def find_version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_versions() -> dict[str, str]:
    """Return the versions of the packages that a choice depends on; a plain Trainer needs no Axolotl."""
    found = {name: find_version(name) for name in RECORDED}
    return {name: version for name, version in found.items() if version is not None}
