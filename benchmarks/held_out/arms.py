"""The arms of the comparison, by name: what each one trains, and the words that change an arm."""

import re
from dataclasses import dataclass
from typing import Any

SAMPLES = 128
HALF = {"ratio": 0.5, "rank_allocation": "match"}
SCORED = {"rank_allocation": "score", "num_samples": SAMPLES}
SEARCH = {"method": "flexora", "flexora": {"steps": 40}}
# The layersel block of every arm. EVA, PEFT's allocation of rank by the data, and ranks by sensitivity have none.
ARMS: dict[str, dict[str, Any] | None] = {
    "lora": {"selection": {"method": "first", "ratio": 1.0}},
    "gradient": {"selection": {"method": "gradient", **SCORED}},
    "gradient group": {"selection": {"method": "gradient", "granularity": "group", **SCORED}},
    "gradient layer": {"selection": {"method": "gradient", "granularity": "layer", **SCORED}},
    "fisher": {"selection": {"method": "fisher", "granularity": "module", **SCORED}},
    "cka": {"selection": {"method": "cka", "num_samples": SAMPLES, **HALF}},
    "random": {"selection": {"method": "random", **HALF}},
    "cka same rank": {"selection": {"method": "cka", "num_samples": SAMPLES, "ratio": 0.5}},
    "random same rank": {"selection": {"method": "random", "ratio": 0.5}},
    "last": {"selection": {"method": "last", **HALF}},
    "l1ra": {"l1ra": {}},
    "pressure": {"l1ra": {"rule": "pressure"}},
    "gradient l1ra": {"selection": {"method": "gradient", **SCORED}, "l1ra": {}},
    "eva": None,
    "fisher half": {"selection": {"method": "fisher", "num_samples": SAMPLES, **HALF}},
    "fisher same rank": {"selection": {"method": "fisher", "num_samples": SAMPLES, "ratio": 0.5}},
    "flexora": {"selection": {**SEARCH, **HALF}},
    "flexora same rank": {"selection": {**SEARCH, "ratio": 0.5}},
    "last same rank": {"selection": {"method": "last", "ratio": 0.5}},
    "sensitivity": None,
}
DEFAULT_ARMS = [*ARMS][: [*ARMS].index("eva") + 1]
# LoRA at half of the rank, the plainest way to train half of the parameters. It is run and stored as LoRA at that rank.
HALF_RANK = "lora half rank"
WORD = re.compile(r"(.+) (p|loraplus|draw|time)(\d+(?:\.\d+)?)")
# Seeds of further draws are apart from the seeds of runs.
DRAW_STRIDE = 1000


@dataclass(frozen=True)
class Arm:
    """An arm.

    Attributes:
        base: its name in ``ARMS``.
        power: p of the scaling s · (lora_r / r_i)^p of a module of rank r_i; None: the package's own.
        ratio: with LoRA+, the learning rate of B by that of A; else None.
        draw: which draw of ``method: random``, from 1.
        time: the longest time of a step as a share of plain LoRA's; the saved time is given back as further steps.
    """

    base: str
    power: float | None = None
    ratio: float | None = None
    draw: int = 1
    time: float | None = None

    def make_block(self, rows: int, seed: int) -> dict[str, Any] | None:
        """Return its ``layersel`` block for a run with ``seed`` on this many rows; None without one."""
        block = ARMS[self.base]
        if block is not None and self.power is not None:
            block = {**block, "scaling_exponent": self.power}
        if block is None or "selection" not in block:
            return block
        selection = dict(block["selection"])
        if "num_samples" in selection:
            selection["num_samples"] = min(selection["num_samples"], rows)
        if self.time is not None:
            selection["time"] = self.time
        if self.draw > 1:
            selection["seed"] = seed + DRAW_STRIDE * (self.draw - 1)
        return {**block, "selection": selection}


def parse_arm(name: str) -> Arm:
    """Return the arm of a name such as ``gradient p0.5 loraplus4``.

    The words after the name of ``ARMS`` are ``pX`` (the power of the scaling), ``loraplusX`` (the ratio of LoRA+'s
    rates), ``drawN`` (another draw of a random choice) and ``timeX`` (the longest time of a step).

    Raises:
        ValueError: if the name is not known, or a word has no effect on the arm.
    """
    words: dict[str, float] = {}
    base = name
    while base not in ARMS and (found := WORD.fullmatch(base)):
        base, word, value = found.groups()
        if word in words:
            raise ValueError(f"arm {name!r}: {word} is written twice.")
        words[word] = float(value)
    if base not in ARMS:
        raise ValueError(f"arm {name!r}: {base!r} is not known. Use one of {', '.join([*ARMS, HALF_RANK])}.")
    block = ARMS[base] or {}
    selection = block.get("selection", {})
    if "p" in words and not ("rank_allocation" in selection or "l1ra" in block or base == "sensitivity"):
        raise ValueError(f"arm {name!r}: all modules of {base!r} have rank r, so that p has no effect.")
    if "draw" in words and (selection.get("method") != "random" or words["draw"] < 2 or words["draw"] % 1):
        raise ValueError(f"arm {name!r}: draw2, draw3 and so on are further draws of a random choice.")
    if "loraplus" in words and words["loraplus"] < 1:
        raise ValueError(f"arm {name!r}: the ratio of LoRA+ is at least 1.")
    if "time" in words and (selection.get("method") != "gradient" or not 0 < words["time"] < 1):
        raise ValueError(f"arm {name!r}: time0.75 and the like limit a step of `gradient`, as a share of plain LoRA's.")
    return Arm(base, words.get("p"), words.get("loraplus"), int(words.get("draw", 1)), words.get("time"))


def check_name(name: str) -> str:
    """Return the name of an arm as it is; a ValueError if there is no such arm."""
    if name != HALF_RANK:
        parse_arm(name)
    return name


def find_stored(name: str, rank: int) -> tuple[str, int]:
    """Return the arm and the rank under which a run is stored; a ValueError if there is no half of the rank."""
    if name != HALF_RANK:
        return name, rank
    if rank % 2:
        raise ValueError(f"arm {name!r}: rank {rank} has no half. Use even ranks.")
    return "lora", rank // 2


def strip_draw(name: str) -> str:
    """Return the name of an arm without the word for its draw."""
    return re.sub(r" draw\d+\b", "", name)
