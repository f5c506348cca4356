"""The table of the report's sections. Each is one function and one row."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from axolotl_layersel.cli.doctor.case import Case, Fact

PACKAGE = "axolotl_layersel.cli.doctor"


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        key: its key in JSON.
        title: its title.
        module: the module of its function, which is imported when it is asked for.
        function: takes the case, and the model if it needs one; returns the facts.
        needs_model: whether it needs the model.
    """

    key: str
    title: str
    module: str
    function: str
    needs_model: bool = True

    def describe(self, case: Case) -> list[Fact]:
        """Return the facts of the section."""
        describe: Callable[..., list[Fact]] = getattr(
            importlib.import_module(f"{PACKAGE}.{self.module}"), self.function
        )
        arguments: tuple[Any, ...] = (case, case.model) if self.needs_model else (case,)
        return describe(*arguments)


SECTIONS = (
    Section("engine", "Engine", "settings", "describe_engine", needs_model=False),
    Section("effect", "What takes effect", "settings", "describe_effect", needs_model=False),
    Section("kernels", "Kernels and optimizer", "settings", "describe_kernels", needs_model=False),
    Section("rows", "Rows", "rows", "describe_rows", needs_model=False),
    Section("layers", "Layers and modules", "layers", "describe_candidates"),
    Section("parameters", "Trainable parameters", "layers", "describe_parameters"),
    Section("memory", "Memory of each process", "memory", "describe_memory"),
    Section("calibration", "Memory while layers are scored", "memory", "describe_pass"),
    Section("time", "Time of a step", "time", "describe_time"),
    Section("collectives", "Communication", "collectives", "describe_collectives"),
    Section("disk", "Disk", "disk", "describe_disk"),
    Section("readers", "Programs that read the adapter", "serving", "describe_serving"),
)
