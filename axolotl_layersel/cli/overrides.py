"""Axolotl's options for keys of the YAML file, such as ``--base-model NAME``, on the commands of this package.

Relied on in axolotl 0.19.0 (``tests/unit/cli/test_overrides.py`` fails when it changes): the table of options in
``axolotl.cli.config_options``, and the rule by which ``axolotl.cli.config.load_cfg`` applies them.
"""

from collections.abc import Mapping
from typing import Any

from typer import Context
from typer.core import TyperCommand, TyperOption

from axolotl_layersel.cli.arguments import DescribedCommand
from axolotl_layersel.config.strict_block import as_mapping

OVERRIDES = "axolotl_layersel.overrides"  # the key in the context of a command
NESTED = "__"  # between a key and the key in its block, such as trl__beta for --trl.beta


class OverridableCommand(DescribedCommand):
    """A command that also takes Axolotl's options; their values are in ``context.meta[OVERRIDES]``, by key.

    Its help does not list them: there are some 400.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take Axolotl's options from the arguments before ``--``, and parse the others as usual."""
        if not ctx.resilient_parsing:  # the completion of a shell
            end = args.index("--") if "--" in args else len(args)
            own = {name for option in self.get_params(ctx) for name in (*option.opts, *option.secondary_opts)}
            overrides, others = split_overrides(ctx, args[:end], own)
            ctx.meta[OVERRIDES] = overrides
            args = [*others, *args[end:]]
        return super().parse_args(ctx, args)


def split_overrides(context: Context, arguments: list[str], own: set[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of Axolotl's options by key, and the other arguments in their order.

    Args:
        context: the context of the command.
        arguments: the arguments of the command.
        own: the names of its own options.

    Raises:
        click.UsageError: if a value has the wrong type or is missing.
    """
    if all(word.partition("=")[0] in own for word in arguments if word.startswith("--")):
        return {}, arguments
    from axolotl.cli.config_options import AXOLOTL_CONFIG_CLI_OPTIONS

    types = {"str": str, "int": int, "float": float}
    options = [
        TyperOption(param_decls=[*names, *filter(None, [key])], type=types.get(kind or ""), default=None)
        for names, key, kind, _ in AXOLOTL_CONFIG_CLI_OPTIONS
        if not own.intersection(part for name in names for part in name.split("/"))
    ]
    table = TyperCommand(
        context.info_name,
        params=[*options],
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    parsed = table.make_context(context.info_name, arguments, parent=context.parent)
    return {key: value for key, value in parsed.params.items() if value is not None}, list(parsed.args)


def apply_overrides(cfg: Any, overrides: Mapping[str, Any]) -> None:
    """Set the keys of ``overrides`` in ``cfg``, a ``DictDefault``, as ``load_cfg`` does."""
    from axolotl.cli.config import _coerce_value

    for name, value in overrides.items():
        key, nested, inner = name.partition(NESTED)
        if cfg.strict and key not in cfg:
            continue
        if nested and not isinstance(cfg[key], dict):
            cfg[key] = {}
        block, key = (cfg[key], inner) if nested else (cfg, key)
        block[key] = _coerce_value(value, block.get(key))


def replace_values(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a YAML file with the values of ``overrides``, as text if an option is text."""
    changed = dict(data)
    for name, value in overrides.items():
        key, nested, inner = name.partition(NESTED)
        changed[key] = {**as_mapping(changed.get(key)), inner: value} if nested else value
    return changed
