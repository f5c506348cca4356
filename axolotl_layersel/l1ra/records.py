"""What happened to the ranks: ranks.csv, and numbers for the run's trackers."""

import csv
import io
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from axolotl_layersel.files import FOLDER, write_atomically

FILE = "ranks.csv"
HEADER = ["step", "module", "rank"]


def ranks_path(folder: str | Path) -> Path:
    """Return where the history of a run or checkpoint in ``folder`` lies."""
    return Path(folder) / FOLDER / FILE


@dataclass
class RankHistory:
    """The rank of every module, by optimizer step: at step 0, at each update, and at the end."""

    ranks: dict[int, dict[str, int]] = field(default_factory=dict)

    def to_csv(self) -> str:
        """Return the rows ``step,module,rank`` in the order of the steps."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(HEADER)
        for step in sorted(self.ranks):
            writer.writerows([step, module, rank] for module, rank in self.ranks[step].items())
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> "RankHistory":
        """Return the history that ``to_csv`` wrote."""
        ranks: dict[int, dict[str, int]] = {}
        for row in csv.DictReader(io.StringIO(text)):
            ranks.setdefault(int(row["step"]), {})[row["module"]] = int(row["rank"])
        return cls(ranks)

    @classmethod
    def read(cls, folder: str | Path) -> "RankHistory":
        """Return the history in ranks.csv of the run or checkpoint in ``folder``."""
        return cls.from_csv(ranks_path(folder).read_text())

    def write(self, folder: str | Path) -> None:
        """Write ranks.csv for the run or checkpoint in ``folder``; it appears at once and complete."""
        write_atomically(ranks_path(folder), self.to_csv().encode())


def group_by_type(ranks: Mapping[str, int]) -> dict[str, list[int]]:
    """Return the ranks by the modules' type, such as ``q_proj``, types in the order in which they come."""
    grouped: dict[str, list[int]] = defaultdict(list)
    for module, rank in ranks.items():
        grouped[module.rpartition(".")[2]].append(rank)
    return dict(grouped)


def describe_update(ranks: dict[str, int], costs: dict[str, int], pool: int, pruned: int, added: int) -> dict:
    """Return an update as numbers for trackers. ``costs``: trainable parameters of one component, by module."""
    return {
        "layersel/total_rank": sum(ranks.values()),
        "layersel/pool": pool,
        "layersel/trainable_parameters_in_use": sum(rank * costs[module] for module, rank in ranks.items()),
        "layersel/components_pruned": pruned,
        "layersel/components_added": added,
        **{f"layersel/rank/{kind}": sum(group) / len(group) for kind, group in group_by_type(ranks).items()},
    }
