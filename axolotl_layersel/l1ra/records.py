"""Record ranks by step: ranks.csv, and metrics for the run's trackers."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from axolotl_layersel.common.csv_record import CsvRecord
from axolotl_layersel.common.files import parse_count
from axolotl_layersel.common.paths import ranks_path

FILE = "ranks.csv"
HEADER = ["step", "module", "rank"]


@dataclass
class RankHistory(CsvRecord):
    """The rank of every module, by optimizer step: at step 0, at each update, and at the end."""

    locate = staticmethod(ranks_path)
    way_out = "Give another run or checkpoint."

    ranks: dict[int, dict[str, int]] = field(default_factory=dict)

    def to_rows(self) -> Iterable[list[Any]]:
        """Return the rows ``step,module,rank`` in the order of the steps."""
        yield HEADER
        for step in sorted(self.ranks):
            for module, rank in self.ranks[step].items():
                yield [step, module, rank]

    @classmethod
    def from_rows(cls, heading: list[str], rows: list[list[str]]) -> "RankHistory":
        """Return the history of ``to_rows``."""
        if heading != HEADER:
            raise ValueError(f"its first line is not {','.join(HEADER)}")
        ranks: dict[int, dict[str, int]] = {}
        for line, (step, module, rank) in enumerate(rows, start=2):
            at_step = ranks.setdefault(parse_count(step), {})
            if module in at_step:
                raise ValueError(f"line {line} names {module!r} a second time")
            at_step[module] = parse_count(rank)
        if list(ranks) != sorted(ranks) or 0 not in ranks:
            raise ValueError("its steps do not ascend from 0")
        differing = next((step for step in ranks if list(ranks[step]) != list(ranks[0])), None)
        if differing is not None:
            raise ValueError(f"it lists other modules at step {differing} than at step 0")
        return cls(ranks)


def group_by_type(ranks: Mapping[str, int]) -> dict[str, list[int]]:
    """Return the ranks by type of module, such as ``q_proj``, in order of appearance."""
    grouped: dict[str, list[int]] = defaultdict(list)
    for module, rank in ranks.items():
        grouped[module.rpartition(".")[2]].append(rank)
    return dict(grouped)


def describe_update(ranks: dict[str, int], costs: dict[str, int], pool: int, pruned: int, added: int) -> dict:
    """Return the metrics of an update. ``costs``: trainable parameters of one component, by module."""
    return {
        "layersel/total_rank": sum(ranks.values()),
        "layersel/pool": pool,
        "layersel/trainable_parameters_in_use": sum(rank * costs[module] for module, rank in ranks.items()),
        "layersel/components_pruned": pruned,
        "layersel/components_added": added,
        **{f"layersel/rank/{kind}": sum(group) / len(group) for kind, group in group_by_type(ranks).items()},
    }
