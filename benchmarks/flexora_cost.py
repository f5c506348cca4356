"""Measure the cost of a search for layers with gates, and its result at a quarter of the published computation.

Steps: ``Trainer.train()`` of plain LoRA, and searches with different numbers of validation micro-batches per gate step
(one gate step after every LoRA step), on the same model and batch. Inputs require gradients, as in Axolotl. The arms
take turns, one step at a time. The unrolled arm has no goal.

Result: searches on the task of planted.py with one validation micro-batch per step, and with eight as published, for
several seeds. The table shows whether both damaged layers are among the three highest gates, and the computation in
forward and backward micro-batches and in seconds.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass

from measuring import (
    Goal,
    Setup,
    StepTimer,
    Turns,
    add_setup_arguments,
    draw_rows,
    make_model,
    make_trainer,
    median_ratio,
    process_pool,
    read_setup,
    report_goals,
    run_quietly,
    take_turns,
    write_json,
)
from peft import LoraConfig, get_peft_model
from planted import LINEARS, draw_damaged, make_damaged, make_rows, make_text, pretrain
from rich import box
from rich.console import Console
from rich.table import Table

from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.selection.methods.flexora import search
from axolotl_layersel.training.prepare import prepare_trainer

PLAIN, UNROLLED = "lora", "unrolled, 1"
SEARCHES = {"1": 1, "2": 2, "4": 4, UNROLLED: 1}
ARMS = (PLAIN, *SEARCHES)
# The limit for the cost of a validation micro-batch, in LoRA steps.
SHARE = 1.15
OURS, PUBLISHED = 1, 8
COMPUTATION_GOAL = 0.25
WARMUP_STEPS = 2


@dataclass(frozen=True)
class Finding:
    """The result of a search on the planted task; layers are sorted by gate, the highest first."""

    seed: int
    val_batches: int
    damaged: list[int]
    layers: list[int]
    micro_batches: int
    seconds: float

    @property
    def found(self) -> bool:
        """Whether both damaged layers are among the three highest gates."""
        return set(self.damaged) <= set(self.layers[:3])


def time_arm(setup: Setup, arm: str, tokens: int, steps: int, turns: Turns) -> list[float]:
    """Return the times of every step of one arm, in turn with the others."""
    warnings.simplefilter("ignore")
    timer = StepTimer(setup.device, turns)
    rows = draw_rows(setup, tokens, (steps + 1) * setup.batch_size + 8)
    model = make_model(setup)
    model.enable_input_require_grads()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(setup, model, folder, dataset=rows, max_steps=steps)
        if arm == PLAIN:
            trainer.add_callback(timer)
            timer.train(trainer)
        else:
            time_search(trainer, timer, arm, steps)
    return timer.seconds


def time_search(trainer, timer: StepTimer, arm: str, steps: int) -> None:
    """Search with ``timer`` around every step; a search calls no callbacks of the user."""

    class TimedCallback(search.SearchCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            timer.on_step_begin(args, state, control, **kwargs)

        def on_step_end(self, args, state, control, **kwargs) -> None:
            super().on_step_end(args, state, control, **kwargs)
            timer.on_step_end(args, state, control, **kwargs)

    search.SearchCallback = TimedCallback
    flexora = {
        "steps": steps,
        "val_batches": SEARCHES[arm],
        "val_samples": 8,
        "hypergradient": "unrolled" if arm == UNROLLED else "first_order",
    }
    selection = {"method": "flexora", "ratio": 0.5, "flexora": flexora}
    prepare_trainer(trainer, LayerselConfig.model_validate({"selection": selection}))


def find_damage(base: dict, seed: int, val_batches: int, steps: int) -> Finding:
    """Search on the planted task."""
    warnings.simplefilter("ignore")
    setup = Setup(hidden_size=64, layers=8, vocabulary=128, batch_size=4, rank=8, device="cpu", dtype="float32")
    model = get_peft_model(make_damaged(base, seed), LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS))
    rows = make_rows(make_text(), setup.batch_size * 200, seed=100 + seed)
    flexora = {"steps": steps, "val_samples": 60, "val_batches": val_batches}
    settings = SelectionConfig.model_validate({"method": "flexora", "ratio": 0.5, "flexora": flexora})
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(setup, model, folder, dataset=rows, max_steps=steps, learning_rate=2e-3, seed=seed)
        started = time.process_time()
        plan = prepare_trainer(trainer, LayerselConfig(selection=settings))
        seconds = time.process_time() - started
    layers = sorted(range(setup.layers), key=lambda layer: -plan.layers[layer].score)
    return Finding(seed, val_batches, draw_damaged(seed), layers, steps * (1 + val_batches), seconds)


def make_step_table(setup: Setup, tokens: int, times: dict[str, list[float]], limits: dict[str, float]) -> Table:
    """Return the medians as a table, with their ratios to plain LoRA and the goals."""
    title = f"{len(times[PLAIN])} steps of {tokens} tokens a row: {setup.describe()}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("validation micro-batches", no_wrap=True)
    for heading in ("s/step", "of plain LoRA", "at most"):
        table.add_column(heading, justify="right")
    for arm in ARMS:
        limit = f"{limits[arm]:.2f}" if arm in limits else ""
        ratio = median_ratio(times[arm], times[PLAIN])
        table.add_row(arm, f"{statistics.median(times[arm]):.3f}", f"{ratio:.3f}", limit)
    return table


def make_finding_table(findings: list[Finding]) -> Table:
    """Return the results of the searches as a table."""
    table = Table(title="the planted task", title_justify="left", box=box.SIMPLE)
    for heading in ("seed", "damaged", "validation micro-batches", "highest gates", "found", "micro-batches", "CPU s"):
        table.add_column(heading, justify="right")
    for finding in findings:
        highest = ", ".join(map(str, finding.layers[:4]))
        row = (finding.seed, finding.damaged, finding.val_batches, highest, "yes" if finding.found else "no")
        table.add_row(*map(str, row), str(finding.micro_batches), f"{finding.seconds:.1f}")
    return table


def main() -> None:
    """Measure, print the tables and check the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setup_arguments(parser, hidden_size=1024, layers=8, vocabulary=1024, batch_size=1)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each row")
    parser.add_argument(
        "--steps", type=int, default=22, help=f"steps of each arm; the first {WARMUP_STEPS} are not counted"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds on the planted task")
    parser.add_argument("--search-steps", type=int, default=60, help="steps of a search on the planted task")
    arguments = parser.parse_args()
    setup, console = read_setup(arguments), Console()

    console.print("measuring steps", style="dim")
    times = take_turns(time_arm, setup, ARMS, arguments.tokens, arguments.steps)
    times = {arm: seconds[WARMUP_STEPS:] for arm, seconds in times.items()}
    console.print("searching for damage", style="dim")
    findings = []
    with process_pool(setup) as pool:
        base = pool.submit(run_quietly, make_base).result()
        for seed in range(arguments.seeds):
            for val_batches in (OURS, PUBLISHED):
                job = (find_damage, base, seed, val_batches, arguments.search_steps)
                findings.append(pool.submit(run_quietly, *job).result())

    limits = {arm: 1 + SHARE * count for arm, count in SEARCHES.items() if arm != UNROLLED}
    console.print(make_step_table(setup, arguments.tokens, times, limits))
    console.print(make_finding_table(findings))
    ours, published = ([f for f in findings if f.val_batches == count] for count in (OURS, PUBLISHED))
    goals = [
        Goal(
            f"step time with {arm} validation micro-batches, of plain LoRA",
            median_ratio(times[arm], times[PLAIN]),
            limit,
        )
        for arm, limit in limits.items()
    ]
    goals.append(
        Goal("searches that missed a damaged layer which the published schedule found", missed(ours, published), 0)
    )
    # CPU time includes a part that does not depend on the number of steps, so it has no goal.
    share = sum(f.micro_batches for f in ours) / sum(f.micro_batches for f in published)
    goals.append(Goal("micro-batches of the published schedule's", share, COMPUTATION_GOAL))
    report_goals(console, goals)
    write_json(
        arguments.json,
        "flexora_cost",
        setup,
        goals,
        tokens=arguments.tokens,
        seconds=times,
        findings=[{**asdict(finding), "found": finding.found} for finding in findings],
    )


def missed(ours: list[Finding], published: list[Finding]) -> int:
    """Return the number of our searches that missed layers that the published schedule found with the same seed."""
    return sum(other.found and not one.found for one, other in zip(ours, published))


def make_base() -> dict:
    """Return the weights of the base, made in a process of its own, like everything that runs torch."""
    return pretrain(make_text())


if __name__ == "__main__":
    main()
