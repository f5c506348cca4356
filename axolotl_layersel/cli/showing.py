"""The plan, the ranks and the search of a run, for ``axolotl-layersel show``."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import gates_path, plan_path, ranks_path
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.reports.pictures import draw_gates, draw_plan, draw_ranks, has_scores
from axolotl_layersel.reports.plan_table import print_plan
from axolotl_layersel.reports.rank_table import print_ranks
from axolotl_layersel.selection.gate_history import GateHistory
from axolotl_layersel.selection.plan import Plan
from axolotl_layersel.selection.plan_file import read_plan


@dataclass
class Record:
    """What a plan.json, or the folder of a run or checkpoint, says.

    Attributes:
        plan: the plan; None if there are only ranks.
        history: the ranks by optimizer step; None without ``l1ra``.
        gates: the course of the search; None without one.
    """

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
        """Draw ranks, and gates or else the plan, and return the paths of the pictures.

        Raises:
            LayerselError: if there is nothing to draw, or a picture cannot be written.
        """
        drawn = []
        if self.history is not None:
            draw_ranks(self.history.ranks, picture)
            drawn.append(picture)
        if self.gates is not None:
            drawn.append(picture.with_stem(f"{picture.stem}-gates") if drawn else picture)
            draw_gates(self.gates, find_kept(self.plan, self.gates), drawn[-1])
        elif self.plan is not None and (has_scores(self.plan) or self.plan.ranks):
            drawn.append(picture.with_stem(f"{picture.stem}-plan") if drawn else picture)
            draw_plan(self.plan, drawn[-1])
        if not drawn:
            method = "this plan" if self.plan is None else f"the plan of method {self.plan.method}"
            raise LayerselError(
                f"--picture: {method} has neither scores nor ranks to draw. Give the folder of a run with l1ra, or a "
                "plan by a method that scores."
            )
        return drawn


def read_record(path: Path, with_gates: bool) -> Record:
    """Return what a plan.json, or the folder of a run or checkpoint, says.

    ``with_gates``: read the search too.

    Raises:
        LayerselError: if nothing of this package is there, or it is damaged.
    """
    if not os.path.isdir(path):  # unlike Path.is_dir, it accepts names of any length
        return Record(read_plan(path, key="PATH"), None, None)
    has_plan, has_ranks, has_gates = (os.path.exists(locate(path)) for locate in (plan_path, ranks_path, gates_path))
    if not (has_plan or has_ranks):
        raise LayerselError(
            f"PATH: {path} holds no layersel/plan.json or ranks.csv, so it is not of a run with axolotl-layersel. Give "
            "the output_dir of a run whose YAML file lists the plugin, one of its checkpoints, or a plan.json."
        )
    plan = read_plan(plan_path(path), key="PATH") if has_plan else None
    history = RankHistory.read(path) if has_ranks else None
    return Record(plan, history, GateHistory.read(path) if has_gates and with_gates else None)


def find_kept(plan: Plan | None, gates: GateHistory) -> list[str]:
    """Return the names of the gates whose layers or modules a plan keeps."""
    if plan is None:
        return []
    modules = tuple(f"{name}." for name in plan.modules) if plan.module_scores else ()
    # The name of a unit is its layer's number, or the common beginning of its modules' names.
    units = [unit for unit in gates.names if any(name.startswith(f"{unit}.") for name in modules)]
    return [*map(str, plan.selected), *units]
