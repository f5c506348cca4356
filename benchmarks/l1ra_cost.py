"""Compare the cost of redistributing rank with plain LoRA and with PEFT's AdaLoRA.

Five arms run a plain ``Trainer.train()`` on the same model and batch. Inputs require gradients, as in Axolotl.

lora r         plain LoRA at rank r.
lora max_rank  plain LoRA at ``max_rank``: the matrices that L1RA computes with.
l1ra           this package's redistribution from r, with room for ``max_rank``, by its default rule.
l1ra pressure  the same by ``rule: pressure``, with which the modules multiply by gates.
adalora        PEFT's AdaLoRA with ``init_r`` max_rank and ``target_r`` r, which allocates rank after the same steps. It
               is called as PEFT documents: after the optimizer's step, before the gradients are cleared.

Time: the arms take turns, one step at a time. Steps that move rank are counted separately in all arms. Peak memory in
addition to the weights: each measurement runs in a process of its own, and includes steps that move rank.

Updates: l1ra by pressure and adalora again, with more layers and few tokens. A share of the gates is closed before
each update of L1RA, so that many components move.
"""

import argparse
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from measuring import (
    LORA_TARGETS,
    MIB,
    Goal,
    PeakMemory,
    Setup,
    StepTimer,
    Stopwatch,
    Turns,
    add_setup_arguments,
    check_peak_memory,
    draw_rows,
    make_model,
    make_trainer,
    median_ratio,
    read_setup,
    report_goals,
    run_alone,
    take_turns,
    warm_up,
    write_json,
)
from peft import AdaLoraConfig, PeftModel
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainerCallback

from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.schedule import find_update_steps
from axolotl_layersel.l1ra.callback import RankCallback
from axolotl_layersel.l1ra.redistribution import RankRedistribution
from axolotl_layersel.training.prepare import prepare_trainer

LOW, HIGH, OURS, PRESSED, ADALORA = "lora r", "lora max_rank", "l1ra", "l1ra pressure", "adalora"
ARMS = (LOW, HIGH, OURS, PRESSED, ADALORA)
MOVING_ARMS = (PRESSED, ADALORA)
STEP_GOAL, UPDATE_GOAL = 1.03, 0.5
# Steps to measure memory: rank moves after the second and the fourth. Gates have no gradient in the first.
MEMORY_STEPS, MEMORY_UPDATE_RATIO = 6, 0.3
WARMUP_STEPS = 2


@dataclass(frozen=True)
class Job:
    """The training of all arms."""

    max_rank: int
    tokens: int
    steps: int
    closed_share: float = 0.0
    update_ratio: float = 0.1

    @property
    def update_steps(self) -> list[int]:
        """The optimizer steps, from 1, after which rank moves."""
        return find_update_steps(self.steps, self.update_ratio, warmup_ratio=0.0)

    @property
    def plain_steps(self) -> list[int]:
        """The other steps, without the first few."""
        return sorted(set(range(WARMUP_STEPS + 1, self.steps + 1)) - set(self.update_steps))


@dataclass(frozen=True)
class Times:
    """Times by step, from 1: wall time, and CPU time in case other work shares the machine."""

    seconds: dict[int, float] = field(default_factory=dict)
    cpu_seconds: dict[int, float] = field(default_factory=dict)

    def choose(self, steps: list[int]) -> list[float]:
        return [self.seconds[step] for step in steps]

    def choose_cpu(self, steps: list[int]) -> list[float]:
        return [self.cpu_seconds[step] for step in steps]


@dataclass(frozen=True)
class Timing:
    """Times of an arm: whole steps, and the part of them that records or moves rank, if any."""

    steps: Times
    rank: Times
    pruned: list[int]
    added: list[int]
    modules: int
    trained: int


class RankTimer:
    """Times everything that concerns rank."""

    def __init__(self, device: str) -> None:
        self.stopwatch = Stopwatch(device)
        self.times = Times()

    def run(self, step: int, function: Callable[[int], None]) -> None:
        self.stopwatch.start()
        function(step)
        self.times.seconds[step], self.times.cpu_seconds[step] = self.stopwatch.stop()


class Allocation(TrainerCallback):
    """Calls AdaLoRA after each step, which records importances and moves rank."""

    def __init__(self, rank_timer: RankTimer) -> None:
        self.rank_timer = rank_timer

    def on_optimizer_step(self, args, state, control, model: PeftModel, **kwargs) -> None:
        allocate: Any = model.base_model.update_and_allocate
        self.rank_timer.run(state.global_step + 1, allocate)


def close_gates(ranks: RankRedistribution, share: float, step: int) -> None:
    """Close ``share`` of the gates in use: half of the gates of random modules."""
    due = round(share * int(ranks.components.active.sum()))
    names = list(ranks.gates.parts)
    for name in random.Random(step).sample(names, len(names)):
        part = ranks.gates.parts[name]
        slots = ranks.components.active[part].nonzero().flatten()[1::2][:due]
        ranks.gates.values[part][slots] = 0.0
        due -= len(slots)


def watch_updates(ranks: RankRedistribution, rank_timer: RankTimer, closed_share: float) -> None:
    """Time every update of ``ranks``, and close ``closed_share`` of the gates in use before each."""
    update = ranks.update

    def watched(step: int) -> None:
        close_gates(ranks, closed_share, step)
        rank_timer.run(step, update)

    ranks.update = watched


def make_adalora(setup: Setup, job: Job) -> AdaLoraConfig:
    """Return an AdaLoRA that allocates rank after the steps at which L1RA does."""
    first, last = job.update_steps[0], job.update_steps[-1]
    return AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=job.max_rank,
        target_r=setup.rank,
        tinit=first - 1,
        tfinal=job.steps - last,
        deltaT=job.update_steps[1] - first,
        total_step=job.steps,
        target_modules=LORA_TARGETS,
    )


def make_arm(
    setup: Setup, arm: str, job: Job, turns: Turns | None, folder: str
) -> tuple[Trainer, StepTimer, RankTimer]:
    """Return the trainer of one arm."""
    rank = job.max_rank if arm == HIGH else setup.rank
    model = make_model(replace(setup, rank=rank), adapter=make_adalora(setup, job) if arm == ADALORA else None)
    model.enable_input_require_grads()
    rows = draw_rows(setup, job.tokens, job.steps * setup.batch_size)
    trainer = make_trainer(setup, model, folder, dataset=rows, max_steps=job.steps)
    rank_timer = RankTimer(setup.device)
    if arm in (OURS, PRESSED):
        # If gates are closed by hand, no others may close.
        pressure = {"gate_lr": 1e-3, "l1_lambda": 0.0} if job.closed_share else {}
        rule = {"rule": "pressure", "budget_unit": "rank", **pressure} if arm == PRESSED else {"last_update_ratio": 1.0}
        l1ra = L1RAConfig(max_rank=job.max_rank, update_ratio=job.update_ratio, **rule)
        prepare_trainer(trainer, LayerselConfig(l1ra=l1ra))
        (ranks,) = (one.ranks for one in trainer.callback_handler.callbacks if isinstance(one, RankCallback))
        watch_updates(ranks, rank_timer, job.closed_share)
    elif arm == ADALORA:
        trainer.add_callback(Allocation(rank_timer))
    # Last, so that the time of a step includes the other callbacks.
    timer = StepTimer(setup.device, turns)
    trainer.add_callback(timer)
    return trainer, timer, rank_timer


def time_arm(setup: Setup, arm: str, job: Job, turns: Turns) -> Timing:
    """Train one arm in turn with the others."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        trainer, timer, rank_timer = make_arm(setup, arm, job, turns, folder)
        trained = trainer.model.get_nb_trainable_parameters()[0]
        timer.train(trainer)
    updates = [entry for entry in trainer.state.log_history if "layersel/pool" in entry]
    return Timing(
        steps=Times(dict(enumerate(timer.seconds, start=1)), dict(enumerate(timer.cpu_seconds, start=1))),
        rank=rank_timer.times,
        pruned=[entry["layersel/components_pruned"] for entry in updates],
        added=[entry["layersel/components_added"] for entry in updates],
        modules=setup.layers * len(LORA_TARGETS),
        trained=trained,
    )


def measure_peak(setup: Setup, arm: str, job: Job) -> int:
    """Return the peak memory of training in addition to the weights, in bytes."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        trainer, timer, _ = make_arm(setup, arm, job, None, folder)
        warm_up(trainer, setup)
        check_peak_memory(setup.device)
        with PeakMemory(setup.device) as peak:
            timer.train(trainer)
    return peak.bytes


def check_steps(timings: dict[str, Timing], setup: Setup, job: Job) -> None:
    """Raise SystemExit unless the arms train matrices of the same sizes, with AdaLoRA's singular values on top."""
    trained = {arm: timing.trained for arm, timing in timings.items()}
    expected = {
        LOW: trained[OURS] * setup.rank // job.max_rank,
        HIGH: trained[OURS],
        OURS: trained[OURS],
        PRESSED: trained[OURS],
        ADALORA: trained[OURS] + job.max_rank * timings[ADALORA].modules,
    }
    if trained != expected:
        raise SystemExit(f"the arms do not train what they should: {trained} parameters, not {expected}")


def check_updates(timing: Timing, setup: Setup, job: Job) -> None:
    """Raise SystemExit unless every update moved as many components as gates were closed before it."""
    due = round(job.closed_share * timing.modules * setup.rank)
    if min(timing.pruned + timing.added) < due:
        raise SystemExit(f"fewer than {due} components moved: {timing.pruned} pruned, {timing.added} added")


def make_step_table(setup: Setup, job: Job, timings: dict[str, Timing], peaks: dict[str, list[int]]) -> Table:
    """Return the medians as a table, with ratios to plain LoRA at ``max_rank`` ("/ max")."""
    title = f"{len(job.plain_steps)} steps of {job.tokens} tokens a row, max_rank {job.max_rank}: {setup.describe()}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("arm", no_wrap=True)
    for heading in ("s/step", "/ max", "CPU / max", "with update", "/ max", "MiB", "/ max"):
        table.add_column(heading, justify="right")
    high, high_peak = timings[HIGH].steps, statistics.median(peaks[HIGH])
    for arm in ARMS:
        times, peak = timings[arm].steps, statistics.median(peaks[arm])
        table.add_row(
            arm,
            f"{statistics.median(times.choose(job.plain_steps)):.3f}",
            f"{median_ratio(times.choose(job.plain_steps), high.choose(job.plain_steps)):.3f}",
            f"{median_ratio(times.choose_cpu(job.plain_steps), high.choose_cpu(job.plain_steps)):.3f}",
            f"{statistics.median(times.choose(job.update_steps)):.3f}",
            f"{median_ratio(times.choose(job.update_steps), high.choose(job.update_steps)):.3f}",
            f"{peak / MIB:.0f}",
            f"{peak / high_peak:.3f}",
        )
    return table


def make_update_table(setup: Setup, job: Job, timings: dict[str, Timing]) -> Table:
    """Return the times of moving rank, and of the same call at the other steps, as a table."""
    ours = timings[PRESSED]
    moves = f"{statistics.median(ours.pruned):.0f} pruned and {statistics.median(ours.added):.0f} added by l1ra"
    title = f"{len(job.update_steps)} updates of {ours.modules} modules, max_rank {job.max_rank}, {moves}: "
    table = Table(title=title + setup.describe(), title_justify="left", box=box.SIMPLE)
    table.add_column("arm", no_wrap=True)
    for heading in ("s/update", "longest", "CPU s/update", "s at other steps"):
        table.add_column(heading, justify="right")
    for arm in MOVING_ARMS:
        times = timings[arm].rank
        moving = times.choose(job.update_steps)
        # AdaLoRA records importances until its last allocation.
        between = [step for step in times.seconds if step in job.plain_steps and step < job.update_steps[-1]]
        table.add_row(
            arm,
            f"{statistics.median(moving):.3f}",
            f"{max(moving):.3f}",
            f"{statistics.median(times.choose_cpu(job.update_steps)):.3f}",
            f"{statistics.median(times.choose(between)):.3f}" if between else "none",
        )
    return table


def main() -> None:
    """Measure, print the tables and check the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setup_arguments(parser, hidden_size=1024, layers=8, vocabulary=1024, batch_size=1)
    parser.add_argument("--max-rank", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each row")
    parser.add_argument(
        "--steps", type=int, default=60, help=f"steps of each arm; the first {WARMUP_STEPS} are not counted"
    )
    parser.add_argument("--memory-repeats", type=int, default=3, help="measurements of each arm's peak memory")
    parser.add_argument("--update-layers", type=int, default=32, help="layers of the model whose updates are timed")
    parser.add_argument(
        "--update-steps", type=int, default=22, help="training steps of that model, in which rank moves several times"
    )
    parser.add_argument(
        "--closed-share", type=float, default=0.1, help="share of the gates to close before each of its updates"
    )
    arguments = parser.parse_args()
    setup, console = read_setup(arguments), Console()
    job = Job(arguments.max_rank, arguments.tokens, arguments.steps)
    update_setup = replace(setup, layers=arguments.update_layers)
    update_job = Job(arguments.max_rank, 16, arguments.update_steps, arguments.closed_share)

    console.print("measuring updates", style="dim")
    updates = take_turns(time_arm, update_setup, MOVING_ARMS, update_job)
    check_updates(updates[PRESSED], update_setup, update_job)
    console.print("measuring peak memory", style="dim")
    peaks: dict[str, list[int]] = {arm: [] for arm in ARMS}
    memory_job = replace(job, steps=MEMORY_STEPS, update_ratio=MEMORY_UPDATE_RATIO)
    for _ in range(arguments.memory_repeats):
        for arm in ARMS:
            peaks[arm].append(run_alone(measure_peak, setup, arm, memory_job))
    console.print("measuring steps", style="dim")
    timings = take_turns(time_arm, setup, ARMS, job)
    check_steps(timings, setup, job)

    console.print(make_step_table(setup, job, timings, peaks))
    console.print(make_update_table(update_setup, update_job, updates))
    ours, high = (timings[arm].steps.choose(job.plain_steps) for arm in (OURS, HIGH))
    moving = updates[PRESSED].rank.choose(update_job.update_steps)
    goals = [
        Goal("l1ra's step time, of plain LoRA at max_rank", median_ratio(ours, high), STEP_GOAL),
        Goal(f"seconds for an update of {updates[PRESSED].modules} modules", statistics.median(moving), UPDATE_GOAL),
    ]
    report_goals(console, goals)
    write_json(
        arguments.json,
        "l1ra_cost",
        setup,
        goals,
        job=asdict(job),
        steps={arm: asdict(timing) for arm, timing in timings.items()},
        peak_bytes=peaks,
        update_job={**asdict(update_job), "layers": update_setup.layers},
        updates={arm: asdict(timing) for arm, timing in updates.items()},
    )


if __name__ == "__main__":
    main()
