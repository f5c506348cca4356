"""The Axolotl plugin that measures a cell of a comparison, and writes its figures next to the folder of its run.

Axolotl calls the hooks of plugins in the order of the file, which lists this one last. It orders and splits the rows
of all cells by one seed, divides the held-out rows, evaluates both parts in training, and changes nothing else.

Relied on in axolotl 0.19.0 (``tests/unit/cli/compare/test_measuring.py`` fails when it changes): the rows are ordered
and split by ``cfg.seed`` between the hooks ``load_datasets`` and ``pre_model_load``; ``add_callbacks_post_trainer`` is
called when the trainer exists, and before any ``post_trainer_create``; the planned steps are those of
``axolotl.utils.trainer.calculate_total_num_steps``.
"""

import json
import math
import os
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from axolotl.integrations.base import BasePlugin
from datasets import Dataset
from pydantic import BaseModel, Field
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from axolotl_layersel.cli.compare.cells import find_digest, list_metrics
from axolotl_layersel.cli.compare.figures import FIGURES, CurvePoint, Figures, write_record
from axolotl_layersel.cli.compare.general import WAY_OUT, read_passages
from axolotl_layersel.common.digests import hash_parts
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.gate_requirements import GENERATING_TRAINERS
from axolotl_layersel.config.strict_block import Block
from axolotl_layersel.config.textual import read_yaml

LEAST = 2  # rows of each part of the held-out rows
WARMING_UP = 3  # steps at the start that do not count for the time of a step
PIECE = 1000  # rows that are hashed at once


class MeasureConfig(Block):
    """``layersel_measure``: what ``axolotl layersel compare`` tells the measuring plugin of a cell."""

    path: ClassVar[str] = "layersel_measure"

    arm: str = Field(description="The name of the arm.")
    data_seed: int = Field(description="The seed that orders and splits the rows, the same in all cells.")
    general: str | None = Field(
        default=None, description="A file of general text, whose loss is measured before and after training."
    )
    evaluations: int = Field(default=8, ge=1, description="Most evaluations in training. Default 8.")
    max_steps: int | None = Field(default=None, description="`max_steps` of the user's file.")
    warmup_steps: float | None = Field(
        default=None, description="`warmup_steps` of the user's file, which shrink with the number of steps."
    )
    held_out_trains: bool | None = Field(
        default=None, description="Whether the user's own run trains on the held-out rows too. Default false."
    )


class MeasureArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's schema."""

    layersel_measure: MeasureConfig | None = Field(default=None, description="Set by `axolotl layersel compare`.")


class MeasuringPlugin(BasePlugin):
    """Measures one run of a comparison."""

    def get_input_args(self) -> str:
        return "axolotl_layersel.cli.compare.measuring.MeasureArgs"

    def __init__(self) -> None:
        super().__init__()
        self.seed: int | None = None  # of the run, while its rows are loaded
        self.test: Dataset | None = None
        self.built = 0.0  # when the trainer existed
        self.measurement: Measurement | None = None

    def register(self, cfg: dict[str, Any]) -> None:
        """Make a refused run end with its sentence, also where it trains plain LoRA."""
        from axolotl_layersel.cli.compare.running import FOLLOW, follow_parent
        from axolotl_layersel.training.ending import end_in_sentences

        end_in_sentences()
        if FOLLOW in os.environ:  # a launcher that is killed cannot end its processes
            follow_parent(signal.SIGKILL)

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Let Axolotl order and split the rows by the seed of the comparison."""
        settings = read_settings(cfg)
        if cfg.rl in GENERATING_TRAINERS:
            raise LayerselError(
                f"rl: {cfg.rl!r} has no loss on held-out rows, by which arms could be compared. Compare another run."
            )
        self.seed = cfg.seed
        cfg.seed = settings.data_seed

    def pre_model_load(self, cfg: Any) -> None:
        """Continue with the run's own seed, also for the first values of LoRA, which Axolotl does not seed."""
        if self.seed is not None:
            cfg.seed, self.seed = self.seed, None
            set_seed(cfg.seed)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Trainer) -> list[TrainerCallback]:
        """Keep the test rows from everything that runs before training, such as a search for layers."""
        trainer.eval_dataset, self.test = divide(trainer.eval_dataset)
        self.built = time.monotonic()
        return []

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Measure the choice of layers, and the training to come."""
        choosing = time.monotonic() - self.built if cfg.layersel else 0.0
        assert self.test is not None, "Axolotl has built the trainer"
        self.measurement = Measurement(cfg, trainer, self.test, choosing)
        trainer.add_callback(self.measurement)

    def post_train_unload(self, cfg: Any) -> None:
        """Write the figures, when the adapter is written and no process waits for another."""
        if self.measurement is not None and self.measurement.is_first:
            write_record(self.measurement.make_figures(cfg), Path(cfg.output_dir).parent / FIGURES)


def read_settings(cfg: Any) -> MeasureConfig:
    """Return the settings of the plugin.

    Raises:
        LayerselError: if the file has none.
    """
    if not cfg.layersel_measure:
        raise LayerselError(
            "layersel_measure: the key is missing, and the measuring plugin is listed. Only `axolotl layersel compare` "
            "writes both; remove the plugin from `plugins`."
        )
    return MeasureConfig.model_validate(dict(cfg.layersel_measure))


def divide(rows: Dataset | None) -> tuple[Dataset, Dataset]:
    """Return the validation rows and the test rows: every other row of the held-out rows.

    Raises:
        LayerselError: if there are too few.
    """
    held_out = 0 if rows is None else len(rows)
    if rows is None or held_out < 2 * LEAST:
        raise LayerselError(
            f"val_set_size: {held_out} held-out rows are too few to compare with: {LEAST} decide the learning rate, "
            f"and {LEAST} others decide between the arms. Raise `val_set_size`, or set `test_datasets`."
        )
    return rows.select(range(0, held_out, 2)), rows.select(range(1, held_out, 2))


def find_real_steps(cfg: Any, trainer: Trainer, settings: MeasureConfig) -> int:
    """Return the optimizer steps of the user's whole run."""
    from axolotl.utils.trainer import calculate_total_num_steps

    from axolotl_layersel.common.randomness import keep_random_state

    if settings.max_steps is not None:
        return settings.max_steps
    rows: Any = trainer.train_dataset
    if cfg.rl or cfg.reward_model:
        steps = math.ceil(len(rows) * cfg.num_epochs / cfg.batch_size)
    else:
        with keep_random_state():
            steps = math.ceil(calculate_total_num_steps(cfg, rows, update=False))
    if settings.held_out_trains:
        assert isinstance(trainer.eval_dataset, Dataset), "the rows are divided"
        steps = math.ceil(steps * (len(rows) + 2 * len(trainer.eval_dataset)) / len(rows))
    return max(steps, 1)


def hash_rows(*parts: Dataset) -> str:
    """Return the digest of the tokens of rows, or of their whole content if they have no tokens yet."""

    def list_parts() -> Iterator[bytes]:
        for rows in parts:
            yield f"{len(rows)}".encode()
            names = ["input_ids"] if "input_ids" in rows.column_names else sorted(rows.column_names)
            for piece in rows.select_columns(names).with_format(None).iter(batch_size=PIECE):
                yield json.dumps(piece, sort_keys=True, default=str).encode()

    return hash_parts(list_parts())


def read_general(path: str, tokenizer: Any, longest: int) -> Dataset:
    """Return general text as rows, see ``read_passages``.

    Args:
        path: the file.
        tokenizer: of the run.
        longest: the number of tokens after which a row is cut.

    Raises:
        LayerselError: if the file cannot be read, or has no text.
    """
    rows = [tokenizer(passage)["input_ids"][:longest] for passage in read_passages(path)]
    rows = [row for row in rows if len(row) > 1]  # a single token has no loss
    if not rows:
        raise LayerselError(f"--general: {path} has no text of two tokens or more. {WAY_OUT}")
    columns = {"input_ids": rows, "labels": rows, "attention_mask": [[1] * len(row) for row in rows]}
    return Dataset.from_dict(columns)


def place_evaluations(steps: int, most: int) -> set[int]:
    """Return at most ``most`` - 1 of ``steps`` steps, evenly spaced, after which the validation rows are evaluated.

    The evaluation after the last step is not among them.
    """
    number = max(min(most, steps), 1)
    return {round(steps * place / number) for place in range(1, number)}


class Measurement(TrainerCallback):
    """Evaluates before, in and after training, and times the steps in between."""

    def __init__(self, cfg: Any, trainer: Trainer, test: Dataset, choosing: float) -> None:
        from axolotl_layersel.engines.collectives import count_ranks, get_rank

        self.trainer, self.test, self.choosing = trainer, test, choosing
        self.settings = read_settings(cfg)
        self.is_first, self.processes = get_rank() == 0, count_ranks()
        self.real_steps = find_real_steps(cfg, trainer, self.settings)
        if self.settings.warmup_steps:
            trainer.args.warmup_steps = round(self.settings.warmup_steps * min(cfg.max_steps / self.real_steps, 1))
        self.general: Dataset | None = None
        if self.settings.general is not None:
            if cfg.rl or cfg.reward_model:
                raise LayerselError(
                    "--general: this run does not train on text, so it has no loss on it. Leave it out."
                )
            self.general = read_general(self.settings.general, trainer.processing_class, cfg.sequence_len)
        self.curve: list[CurvePoint] = []
        self.durations: list[float] = []
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self.general_losses: list[float] = []
        self.started = 0.0  # when the step began
        self.peak = 0  # bytes

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate the model that training starts from."""
        self.remember_peak()
        self.before = self.evaluate(self.test)
        self.measure_general()
        self.add_point(0)
        self.continue_clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Add a step's time, and evaluate after some of the steps."""
        wait_for_device()
        self.durations.append(time.monotonic() - self.started)
        assert isinstance(self.trainer.eval_dataset, Dataset), "the rows are divided"
        # They evaluate no more rows than the run trains on, or a short run would be mostly evaluation.
        trained = state.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        most = min(self.settings.evaluations, trained // len(self.trainer.eval_dataset))
        if state.global_step in place_evaluations(state.max_steps, most):
            self.remember_peak()
            self.add_point(state.global_step)
        self.continue_clock()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate the trained model, and gather the memory of all processes."""
        from axolotl_layersel.engines.collectives import gather_from_all

        self.remember_peak()
        self.add_point(state.global_step)
        self.after = self.evaluate(self.test)
        self.measure_general()
        self.peak = max(gather_from_all(self.peak))

    def add_point(self, step: int) -> None:
        """Evaluate the validation rows; every process must call this."""
        assert isinstance(self.trainer.eval_dataset, Dataset), "the rows are divided"
        loss = self.evaluate(self.trainer.eval_dataset)["eval_loss"]
        if not math.isfinite(loss):
            raise LayerselError(
                f"learning_rate: {self.trainer.args.learning_rate:g} ends in a loss of {loss} after {step} steps. "
                "Compare lower rates."
            )
        self.curve.append(CurvePoint(step=step, seconds=sum(self.durations), validation_loss=loss))

    def evaluate(self, rows: Dataset) -> dict[str, float]:
        """Return the metrics of rows, and leave the random streams unchanged; every process must call this."""
        from axolotl_layersel.common.randomness import keep_random_state

        with keep_random_state():
            return self.trainer.evaluate(eval_dataset=rows)

    def measure_general(self) -> None:
        """Evaluate the general text, if there is any."""
        if self.general is not None:
            self.general_losses.append(self.evaluate(self.general)["eval_loss"])

    def continue_clock(self) -> None:
        """Begin to time a step, and forget the peak of the memory of an evaluation."""
        import torch

        wait_for_device()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.started = time.monotonic()

    def remember_peak(self) -> None:
        """Keep the peak of the device's memory, or that of this process, which includes evaluations."""
        import resource

        import torch

        if torch.cuda.is_available():
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        else:
            self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def make_figures(self, cfg: Any) -> Figures:
        """Return the figures of the run, whose adapter is in ``output_dir``; on process 0.

        Raises:
            LayerselError: if a loss is not finite, or the adapter cannot be read.
        """
        import torch

        from axolotl_layersel.lora.names import WEIGHTS
        from axolotl_layersel.reports.outcome import read_outcome

        folder, config = Path(cfg.output_dir), read_yaml(Path(cfg.axolotl_config_path)) or {}
        outcome = read_outcome(folder)
        assert outcome.file is not None, "the run has written its adapter"
        sizes = outcome.file.sizes
        lora = outcome.parameters.trained if outcome.parameters else sum(sizes[name] for name in outcome.trained)
        others = [shape for name, shape in outcome.file.shapes.items() if ".lora_" not in name]
        plan = outcome.plan
        durations = self.durations[WARMING_UP:] or self.durations
        losses = {"before": self.before["eval_loss"], "after": self.after["eval_loss"]}
        for when, loss in losses.items():
            if not math.isfinite(loss):
                raise LayerselError(
                    f"learning_rate: {cfg.learning_rate} has a loss of {loss} on the test rows {when} training. "
                    "Compare other rates."
                )
        train: Any = self.trainer.train_dataset
        held_out: Any = self.trainer.eval_dataset
        return Figures(
            arm=self.settings.arm,
            rate=float(cfg.learning_rate),
            seed=cfg.seed,
            steps=cfg.max_steps,
            config_digest=find_digest(config),
            real_steps=self.real_steps,
            train_rows=len(train),
            validation_rows=len(held_out),
            test_rows=len(self.test),
            rows_digest=hash_rows(train, held_out, self.test),
            validation_loss=self.curve[-1].validation_loss,
            test_loss=losses["after"],
            base_test_loss=losses["before"],
            trainable_parameters=lora + sum(map(math.prod, others)),
            seconds_choosing=self.choosing,
            seconds_per_step=statistics.median(durations),
            seconds_training=sum(self.durations),
            peak_memory_bytes=self.peak,
            memory_of="device" if torch.cuda.is_available() else "process",
            adapter_bytes=(folder / WEIGHTS).stat().st_size,
            curve=self.curve,
            general_before=self.general_losses[0] if self.general_losses else None,
            general_after=self.general_losses[-1] if self.general_losses else None,
            metrics=list_metrics(self.after),
            ranks=outcome.ranks,
            selected=(len(plan.selected), len(plan.layers)) if plan else None,
            engine=self.find_engine_name(),
            processes=self.processes,
        )

    def find_engine_name(self) -> str:
        """Return the engine's name as in plans, or accelerate's for one that only plain LoRA runs on."""
        from axolotl_layersel.engines import find_engine

        try:
            return find_engine(self.trainer).name
        except LayerselError:
            return self.trainer.accelerator.distributed_type.value.lower()


def wait_for_device() -> None:
    """Return when the accelerator has finished its work, so that the time of a step is known."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
