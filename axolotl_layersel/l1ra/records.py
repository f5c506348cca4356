"""Record ranks by step: ranks.csv, and metrics for the run's trackers."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from axolotl_layersel.common.files import format_csv, parse_count, parse_csv, read_parsed, write_atomically
from axolotl_layersel.common.paths import ranks_path

FILE = "ranks.csv"
HEADER = ["step", "module", "rank"]


@dataclass
class RankHistory:
    """The rank of every module, by optimizer step: at step 0, at each update, and at the end."""

    ranks: dict[int, dict[str, int]] = field(default_factory=dict)

    def to_csv(self) -> str:
        """Return rows ``step,module,rank``, by ascending step."""
        steps = sorted(self.ranks)
        rows = ([step, module, rank] for step in steps for module, rank in self.ranks[step].items())
        return format_csv([HEADER, *rows])

    @classmethod
    def from_csv(cls, text: str) -> "RankHistory":
        """Return the history in the text of a ranks.csv.

        Raises:
            ValueError, csv.Error: naming the fault in the text.
        """
        header, *rows = parse_csv(text)
        if header != HEADER:
            raise ValueError(f"its first line is not {','.join(HEADER)}")
        ranks: dict[int, dict[str, int]] = {}
        for line, row in enumerate(rows, start=2):
            if len(row) != len(HEADER):
                raise ValueError(f"line {line} has {len(row)} fields, not {len(HEADER)}")
            at_step = ranks.setdefault(parse_count(row[0]), {})
            if row[1] in at_step:
                raise ValueError(f"line {line} names {row[1]!r} a second time")
            at_step[row[1]] = parse_count(row[2])
        if list(ranks) != sorted(ranks) or 0 not in ranks:
            raise ValueError("its steps do not ascend from 0")
        differing = next((step for step in ranks if list(ranks[step]) != list(ranks[0])), None)
        if differing is not None:
            raise ValueError(f"it lists other modules at step {differing} than at step 0")
        return cls(ranks)

    @classmethod
    def read(cls, folder: str | Path, key: str = "PATH") -> "RankHistory":
        """Return the history in the ranks.csv of a run or checkpoint.

        Raises:
            LayerselError: naming ``key`` if the file is missing or damaged.
        """
        return read_parsed(key, ranks_path(folder), "Give another run or checkpoint.", cls.from_csv)

    def write(self, folder: str | Path) -> None:
        """Write the ranks.csv of a run or checkpoint atomically."""
        write_atomically(ranks_path(folder), self.to_csv().encode())


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
