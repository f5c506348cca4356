"""Compare the cost of a training step with LoRA in the upper half of the layers and with LoRA in all layers.

Three arms run a plain ``Trainer.train()`` with the same model, batch and LoRA rank:

all       LoRA in every layer. Inputs require gradients, as in Axolotl.
layersel  the same, after the package's selection with ``method: last`` and ``ratio: 0.5``. It removes the LoRA of the
          other layers, and ends the backward pass at the lowest layer that trains.
stock     only PEFT, with LoRA in the same layers (``layers_to_transform``) and no input gradients. The Trainer switches
          those on under checkpointing, so they are switched off again (``disable_input_require_grads``). Reentrant
          checkpointing would then train nothing. For it, layers without LoRA are not checkpointed, and the output of
          the last of them requires gradients; stock PEFT does neither.

Time: the three arms take turns, one step at a time. Peak memory in addition to the weights: each measurement runs in a
process of its own.
"""

import argparse
import statistics
import tempfile
from dataclasses import asdict, dataclass, field

from measuring import (
    MIB,
    Goal,
    PeakMemory,
    Setup,
    StepTimer,
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
from peft import PeftModel
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainerCallback

from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.select import select_layers

ALL, OURS, STOCK = "all", "layersel", "stock"
ARMS = (ALL, OURS, STOCK)
NONE, REENTRANT, NON_REENTRANT = "none", "reentrant", "non-reentrant"
TIME_GOALS = {NONE: 0.78, REENTRANT: 0.70, NON_REENTRANT: 0.70}
STOCK_GOAL = 1.05
MEMORY_STEPS = 2


@dataclass
class Cost:
    """All measurements with one kind of checkpointing, by arm."""

    checkpointing: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, list[int]] = field(default_factory=lambda: {arm: [] for arm in ARMS})

    def time_ratio(self, arm: str, other: str) -> float:
        return median_ratio(self.seconds[arm], self.seconds[other])

    def memory_ratio(self, arm: str, other: str) -> float:
        return statistics.median(self.peak_bytes[arm]) / statistics.median(self.peak_bytes[other])


class NoInputGradients(TrainerCallback):
    """Undoes the changes of the Trainer for checkpointing; ``lowest`` is the lowest layer with LoRA."""

    def __init__(self, checkpointing: str, lowest: int) -> None:
        self.checkpointing = checkpointing
        self.lowest = lowest

    def on_train_begin(self, args, state, control, model: PeftModel, **kwargs) -> None:
        if self.checkpointing != NONE:
            model.disable_input_require_grads()
        if self.checkpointing == REENTRANT:
            below = model.get_base_model().model.layers[: self.lowest]
            for layer in below:
                layer.gradient_checkpointing = False
            below[-1].register_forward_hook(lambda layer, given, output: output.requires_grad_(True))


def make_arm(
    setup: Setup, arm: str, checkpointing: str, tokens: int, steps: int, turns: Turns | None, folder: str
) -> tuple[Trainer, StepTimer]:
    """Return the trainer of one arm for ``steps`` steps."""
    lowest = setup.layers - setup.layers // 2
    model = make_model(setup, list(range(lowest, setup.layers)) if arm == STOCK else None)
    timer = StepTimer(setup.device, turns)
    callbacks = [timer]
    if arm == STOCK:
        callbacks.append(NoInputGradients(checkpointing, lowest))
    else:
        model.enable_input_require_grads()
    trainer = make_trainer(
        setup,
        model,
        folder,
        dataset=draw_rows(setup, tokens, steps * setup.batch_size),
        callbacks=callbacks,
        max_steps=steps,
        gradient_checkpointing=checkpointing != NONE,
        gradient_checkpointing_kwargs={"use_reentrant": checkpointing == REENTRANT} if checkpointing != NONE else None,
    )
    if arm == OURS:
        select_layers(Run.of(trainer), SelectionConfig(method="last", ratio=0.5))
    return trainer, timer


def time_arm(
    setup: Setup, arm: str, checkpointing: str, tokens: int, warmup: int, steps: int, turns: Turns
) -> tuple[list[float], int]:
    """Return the seconds of the steps after the first ``warmup``, and the number of trained parameters."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, timer = make_arm(setup, arm, checkpointing, tokens, warmup + steps, turns, folder)
        timer.train(trainer)
        return timer.seconds[warmup:], trainer.model.get_nb_trainable_parameters()[0]


def measure_peak(setup: Setup, arm: str, checkpointing: str, tokens: int) -> int:
    """Return the peak memory of training in addition to the weights, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = make_arm(setup, arm, checkpointing, tokens, MEMORY_STEPS, None, folder)
        warm_up(trainer, setup)
        check_peak_memory(setup.device)
        with PeakMemory(setup.device) as peak:
            trainer.train()
    return peak.bytes


def measure_times(setup: Setup, checkpointing: str, tokens: int, warmup: int, steps: int) -> dict[str, list[float]]:
    """Return the seconds of every step of every arm; step i of each arm ran directly after that of the previous arm.

    Raises:
        SystemExit: if ours and stock train different numbers of parameters, because then they differ in work.
    """
    results = take_turns(time_arm, setup, ARMS, checkpointing, tokens, warmup, steps)
    trained = {arm: parameters for arm, (_, parameters) in results.items()}
    if trained[OURS] != trained[STOCK] or 2 * trained[OURS] != trained[ALL]:
        raise SystemExit(f"the arms do not train what they should: {trained} parameters")
    return {arm: seconds for arm, (seconds, _) in results.items()}


def make_table(setup: Setup, tokens: int, steps: int, costs: list[Cost]) -> Table:
    """Return the medians as a table, with ratios to LoRA in all layers and to stock PEFT."""
    title = f"{steps} steps of {tokens} tokens a row: {setup.describe()}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("checkpointing", "LoRA"):
        table.add_column(heading, no_wrap=True)
    for heading in ("s/step", "/ all", "/ stock", "MiB", "/ all", "/ stock"):
        table.add_column(heading, justify="right")
    for cost in costs:
        for arm in ARMS:
            table.add_row(
                cost.checkpointing if arm == ALL else "",
                arm,
                f"{statistics.median(cost.seconds[arm]):.3f}",
                *(f"{cost.time_ratio(arm, other):.3f}" for other in (ALL, STOCK)),
                f"{statistics.median(cost.peak_bytes[arm]) / MIB:.0f}",
                *(f"{cost.memory_ratio(arm, other):.3f}" for other in (ALL, STOCK)),
                end_section=arm == ARMS[-1],
            )
    return table


def judge(costs: list[Cost]) -> list[Goal]:
    """Return the goals for each kind of checkpointing."""
    goals = []
    for cost in costs:
        kind = f"checkpointing {cost.checkpointing}"
        goals += [
            Goal(
                f"{kind}: step time, of LoRA in all layers", cost.time_ratio(OURS, ALL), TIME_GOALS[cost.checkpointing]
            ),
            Goal(f"{kind}: step time, of stock PEFT", cost.time_ratio(OURS, STOCK), STOCK_GOAL),
            Goal(f"{kind}: peak memory, of stock PEFT", cost.memory_ratio(OURS, STOCK), STOCK_GOAL),
        ]
    return goals


def main() -> None:
    """Measure, print the table and check the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setup_arguments(parser, hidden_size=1024, layers=8, vocabulary=1024, batch_size=1)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each row")
    parser.add_argument("--checkpointing", choices=tuple(TIME_GOALS), nargs="+", default=list(TIME_GOALS))
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each arm")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps before them")
    parser.add_argument("--memory-repeats", type=int, default=3, help="measurements of each arm's peak memory")
    arguments = parser.parse_args()
    setup, console = read_setup(arguments), Console()
    if setup.layers % 2:
        parser.error(f"--layers {setup.layers}: half of them get LoRA, give an even number")

    costs = [Cost(kind) for kind in arguments.checkpointing]
    for cost in costs:
        console.print(f"measuring with checkpointing {cost.checkpointing}", style="dim")
        for _ in range(arguments.memory_repeats):
            for arm in ARMS:
                cost.peak_bytes[arm].append(run_alone(measure_peak, setup, arm, cost.checkpointing, arguments.tokens))
        cost.seconds = measure_times(setup, cost.checkpointing, arguments.tokens, arguments.warmup, arguments.steps)
    console.print(make_table(setup, arguments.tokens, arguments.steps, costs))
    goals = judge(costs)
    report_goals(console, goals)
    results = [asdict(cost) for cost in costs]
    write_json(arguments.json, "training_cost", setup, goals, tokens=arguments.tokens, results=results)


if __name__ == "__main__":
    main()
