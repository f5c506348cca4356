"""The plan, the ranks and the search of a run, for ``axolotl-layersel show``."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import gates_path, plan_path, ranks_path
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.reports.pictures import list_figures, write_figure
from axolotl_layersel.reports.plan_table import print_plan
from axolotl_layersel.reports.rank_table import print_ranks
from axolotl_layersel.selection.gate_history import GateHistory
from axolotl_layersel.selection.plan import Plan
from axolotl_layersel.selection.plan_file import read_plan


@dataclass
class Record:
    """What a plan.json, or the folder of a run or checkpoint, says.

    Attributes:
        path: the plan.json or the folder.
        plan: the plan; None if there are only ranks.
        history: the ranks by optimizer step; None without ``l1ra``.
        gates: the course of the search; None without one.
    """

    path: Path
    plan: Plan | None
    history: RankHistory | None
    gates: GateHistory | None

    def print(self) -> None:
        """Print the tables of the plan and of the ranks."""
        if self.plan is not None:
            print_plan(self.plan)
        if self.history is not None:
            ranks = self.history.ranks
            print_ranks(ranks[0], ranks[max(ranks)])

    def format_json(self) -> str:
        """Return the plan and the ranks by step as JSON in ASCII, each null if there is none."""
        content = {
            "plan": None if self.plan is None else self.plan.model_dump(mode="json"),
            "ranks": None if self.history is None else self.history.ranks,
        }
        return json.dumps(content, indent=2)

    def draw(self, picture: Path) -> list[Path]:
        """Draw the pictures that a run has in its folder, and return their paths.

        The first one is drawn to ``picture``, and each further one has its name after the file's.

        Raises:
            LayerselError: if there is nothing to draw, or a picture cannot be written.
        """
        base_model = find_base_model(self.path) if self.plan is None else self.plan.base_model
        figures = list_figures(self.path, self.plan, self.gates, self.history, base_model)
        drawn: dict[Path, Callable[[], Any]] = {}
        for name, make in figures.items():
            drawn[picture.with_stem(f"{picture.stem}-{name}") if drawn else picture] = make
        for path, make in drawn.items():
            write_figure(make, [path])
        if not drawn:
            method = "this plan" if self.plan is None else f"the plan of method {self.plan.method}"
            raise LayerselError(
                f"--picture: {method} has neither scores nor ranks to draw. Give the folder of a run with l1ra, or a "
                "plan by a method that scores."
            )
        return list(drawn)


def read_record(path: Path, with_gates: bool) -> Record:
    """Return what a plan.json, or the folder of a run or checkpoint, says.

    ``with_gates``: read the search too.

    Raises:
        LayerselError: if nothing of this package is there, or it is damaged.
    """
    if not os.path.isdir(path):  # unlike Path.is_dir, it accepts names of any length
        return Record(path, read_plan(path, key="PATH"), None, None)
    has_plan, has_ranks, has_gates = (os.path.exists(locate(path)) for locate in (plan_path, ranks_path, gates_path))
    if not (has_plan or has_ranks):
        raise LayerselError(
            f"PATH: {path} holds no layersel/plan.json or ranks.csv, so it is not of a run with axolotl-layersel. Give "
            "the output_dir of a run whose YAML file lists the plugin, one of its checkpoints, or a plan.json."
        )
    plan = read_plan(plan_path(path), key="PATH") if has_plan else None
    history = RankHistory.read(path) if has_ranks else None
    return Record(path, plan, history, GateHistory.read(path) if has_gates and with_gates else None)


def find_base_model(folder: Path) -> str | None:
    """Return the base model that the adapter in ``folder`` names, or None."""
    try:
        content = json.loads((folder / "adapter_config.json").read_bytes())
    except (OSError, ValueError):  # for the title of a picture, which does without
        return None
    name = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None
