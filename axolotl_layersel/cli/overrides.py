"""Axolotl's options for keys of the YAML file, such as ``--base-model NAME``, on the commands of this package.

Relied on in axolotl 0.19.0 (``tests/unit/cli/test_overrides.py`` fails when it changes): the table of options in
``axolotl.cli.config_options``, and the rule by which ``axolotl.cli.config.load_cfg`` applies them and
``_coerce_value`` gives them a type.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from typer import Context
from typer.core import TyperCommand, TyperOption

from axolotl_layersel.cli.arguments import DescribedCommand
from axolotl_layersel.config.strict_block import as_mapping

OVERRIDES = "axolotl_layersel.overrides"  # the key in the context of a command
NESTED = "__"  # between a key and the key in its block, such as trl__beta for --trl.beta
# The words that stand for other values where the file has none.
WORDS = {"true": True, "yes": True, "false": False, "no": False, "null": None, "none": None, "~": None}


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


def apply_overrides(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a YAML file with the values of ``overrides``, as ``load_cfg`` sets them.

    A file with ``strict: true`` gets no new keys.
    """
    changed = dict(data)
    for name, value in overrides.items():
        key, nested, inner = name.partition(NESTED)
        if data.get("strict") and key not in data:
            continue
        if nested:
            block = as_mapping(changed.get(key))
            changed[key] = {**block, inner: coerce(value, block.get(inner))}
        else:
            changed[key] = coerce(value, changed.get(key))
    return changed


def coerce(value: Any, existing: Any = None) -> Any:
    """Return the value of an option with the type that Axolotl gives it.

    Axolotl's own function is not called, because the import of its module takes 15 seconds of a processor.

    Args:
        value: the value, as text if the option is text.
        existing: the value in the file, which decides the type; None if there is none.
    """
    if not isinstance(value, str):
        return value
    if isinstance(existing, bool):
        return value.lower() in ("true", "1", "yes")
    if existing is not None:
        kinds = [kind for kind in (int, float) if isinstance(existing, kind)]
        return convert(value, kinds)
    return WORDS[value.lower()] if value.lower() in WORDS else convert(value, [int, float])


def convert(text: str, kinds: Sequence[type[int] | type[float]]) -> Any:
    """Return a text as the first kind of number that it is, or as it is."""
    for kind in kinds:
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
