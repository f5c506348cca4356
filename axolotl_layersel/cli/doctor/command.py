"""The report on a YAML file: everything that refuses it, and then section by section what it will do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from axolotl_layersel.cli.doctor.case import Case
from axolotl_layersel.cli.doctor.configuration import find_configuration
from axolotl_layersel.cli.doctor.light_imports import importing_lightly
from axolotl_layersel.cli.doctor.sections import SECTIONS
from axolotl_layersel.common.errors import LayerselError, find_fault
from axolotl_layersel.config.faults import list_faults
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.textual import find_seed


@dataclass(frozen=True)
class Report:
    """What ``doctor`` says.

    Attributes:
        faults: everything that refuses the file.
        sections: the facts by section, and by fact.
        missing: why sections are left out; None if none is.
        lines: the report as text.
    """

    faults: list[str]
    sections: dict[str, dict[str, Any]]
    missing: str | None
    lines: list[str]

    def format_json(self) -> str:
        """Return the report as JSON in ASCII."""
        content = {"refused": bool(self.faults), "faults": self.faults, "missing": self.missing, **self.sections}
        return json.dumps(content, indent=2)


def examine(
    data: Mapping[str, Any], model_config: Path | None = None, processes: int = 1, lowest: int | None = None
) -> Report:
    """Return the report on a YAML file.

    Args:
        data: the content of the file.
        model_config: the config.json of the base model; default: that of ``base_model``, if it is on this machine.
        processes: the number of processes of the run.
        lowest: the lowest kept layer whose step time is asked for.
    """
    block, faults = list_faults(data)
    if block is None:  # it is missing, or no mapping: the rest of the report is on plain LoRA
        block = LayerselConfig.model_construct()
    case, missing = Case(data, block.drop_unread(), block, processes, lowest=lowest), None
    try:
        model, missing = load_model(case, model_config)
        case = replace(case, model=model)
        faults += [fault for fault in (model.faults if model else []) if fault not in faults]
    except LayerselError as error:
        faults.append(str(error))
    wrong = list(find_fault(check_lowest, case))
    if wrong:
        faults += wrong
        case = replace(case, lowest=None)
    lines, sections = list(tell_faults(faults)), {}
    fits = case.model is not None and not case.model.faults
    for section in SECTIONS:
        if section.needs_model and not fits:
            continue
        facts = section.describe(case)
        if facts:
            sections[section.key] = {fact.key: fact.value for fact in facts}
            lines += ["", section.title, *(f"  {fact.text}" for fact in facts if fact.text)]
    if missing:
        lines += ["", missing]
    return Report(faults, sections, missing, lines)


def check_lowest(case: Case) -> None:
    """Raise LayerselError if the layer that is asked about has no LoRA."""
    if case.lowest is not None and case.model is not None and case.lowest not in case.model.stack.lora_modules:
        known = sorted(case.model.stack.lora_modules)
        raise LayerselError(f"--lowest-layer: {case.lowest} has no LoRA. Give one of layers {known[0]} to {known[-1]}.")


def tell_faults(faults: list[str]) -> Iterator[str]:
    """Yield the lines about what refuses a file."""
    if not faults:
        yield "No fault was found in what axolotl-layersel reads. `axolotl-layersel check` also checks Axolotl's keys."
        return
    yield f"The run would be refused, for {'this reason' if len(faults) == 1 else f'these {len(faults)} reasons'}:"
    yield from (f"  {number}. {fault}" for number, fault in enumerate(faults, start=1))


def load_model(case: Case, given: Path | None) -> tuple[Any, str | None]:
    """Return the model of a case, or None and why its configuration is not at hand."""
    content, missing = find_configuration(case.data, given)
    if content is None:
        return None, missing
    with importing_lightly():
        from axolotl_layersel.cli.doctor.model import build_model

        return build_model(content, case.data, case.block.selection, find_seed(case.data)), None
