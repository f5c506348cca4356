"""YAML files as Axolotl reads them, in the process of a test."""

from collections.abc import Iterator
from contextlib import contextmanager

PLUGIN = "axolotl_layersel.LayerSelectionPlugin"


@contextmanager
def without_plugins() -> Iterator[None]:
    """Axolotl keeps the plugins of earlier files in one process: start and end without any."""
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().plugins.clear()
    yield
    PluginManager.get_instance().plugins.clear()


def validate(content: dict, processes: int = 1):
    """Return what Axolotl makes of a YAML file's content on a machine with H100 GPUs; no model is loaded."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault(content)
    prepare_plugins(cfg)
    capabilities = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": processes, "compute_capability": "sm_90"}
    return validate_config(cfg, capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"})


def known_keys(model: type) -> set[str]:
    """Return the names and aliases of a pydantic model's fields."""
    keys = set(model.model_fields)
    for field in model.model_fields.values():
        keys.update(name for name in (field.alias, field.validation_alias) if isinstance(name, str))
        keys.update(getattr(field.validation_alias, "choices", ()))
    return keys


def find_unknown_keys(content: dict) -> set[str]:
    """Return the keys of a YAML file's content that Axolotl, with the plugins registered last, ignores."""
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.schemas.datasets import SFTDataset
    from axolotl.utils.schemas.fsdp import FSDPConfig

    unknown = set(content) - known_keys(merge_input_args()[0])
    unknown |= set(content.get("fsdp_config", {})) - known_keys(FSDPConfig)
    for key in ("datasets", "test_datasets"):
        for dataset in content.get(key, []):
            unknown |= set(dataset) - known_keys(SFTDataset)
    return unknown
