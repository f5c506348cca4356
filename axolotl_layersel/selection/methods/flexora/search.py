"""The search: LoRA steps on training batches alternate with gate steps on validation batches."""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.progress import Pace, PhaseProgress
from axolotl_layersel.config.flexora import SETTING, Search, check_attention, describe_sharded
from axolotl_layersel.config.selection import describe_generated
from axolotl_layersel.engines import collectives, trainers
from axolotl_layersel.lora.gates import Gates
from axolotl_layersel.lora.layers import LayerStack
from axolotl_layersel.lora.modules import get_linears, list_linear
from axolotl_layersel.lora.plain_lora import check_plain_lora
from axolotl_layersel.lora.removal import freeze_unselected
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.data.calibration import check_indexable
from axolotl_layersel.selection.data.label_alignment import find_kind
from axolotl_layersel.selection.gate_history import GateHistory
from axolotl_layersel.selection.methods.flexora.convergence import still_move
from axolotl_layersel.selection.methods.flexora.gating import find_alpha_gradient, find_multipliers
from axolotl_layersel.selection.methods.flexora.trial_training import run_trial
from axolotl_layersel.selection.methods.flexora.unrolled import InnerSteps
from axolotl_layersel.selection.methods.flexora.validation import (
    ValidationBatches,
    count_targets,
    find_eval_rows,
    find_least,
    hold_out,
    take_rows,
)
from axolotl_layersel.selection.types import Selection

LOG = logging.getLogger("axolotl.layersel")


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        history: its course; ``history.final`` are the gates at the end.
        validation_rows: rows of the training set that were held out, or of the eval set, in the order drawn.
        validation: the rows themselves.
    """

    history: GateHistory
    validation_rows: list[int]
    validation: list[dict[str, Any]]


def search_gates(
    selection: Selection,
    settings: Search,
    gated: dict[str, list[str]],
    choose: Callable[[dict[str, float]], list[str]],
) -> SearchResult:
    """Search with one gate for each group of LoRA modules, then restore everything. Every process must call this.

    Args:
        selection: its seed draws the validation rows, their order, and the order of the training rows.
        settings: of the search.
        gated: the names of the modules under each gate, by gate name; other LoRA modules do not take part.
        choose: returns the names of the gates that would be kept, for ``patience``.

    Raises:
        LayerselError: on every process, if the search cannot be made or fails.
    """
    run, seed = selection.run, selection.settings.seed
    trainer, lora = run.trainer, run.lora_modules
    modules = [module for names in gated.values() for module in names]
    collectives.decide_on_rank_zero(lambda: check_search(run, settings, {module: lora[module] for module in modules}))
    kind = find_kind(run.model)
    source, rows, train_dataset = SOURCES[settings.val_source](run, settings, seed, kind)
    validation = [dict(source[row]) for row in rows]
    downs = {name: [get_linears(lora[module], run.adapter)[0] for module in names] for name, names in gated.items()}
    search = GateSearch(run, settings, downs, ValidationBatches(trainer, validation, seed), choose, kind)
    if collectives.get_rank() == 0:
        LOG.info(
            "layersel: a search with %d gates: %d optimizer steps on %d training rows, a gate step after every %d of "
            "them on %d validation rows",
            len(gated),
            settings.steps,
            len(train_dataset),
            settings.inner_steps,
            len(rows),
        )
        if len(list_linear(lora)) < len(lora):
            LOG.info(
                "layersel: gates are on linear LoRA modules; LoRA on experts takes no part in the search, and is kept "
                "or left out with what it is in"
            )
    with leaving_out(run, selection.stack, modules), search.attached():
        run_trial(run, settings.steps, train_dataset, SearchCallback(search), seed)
    search.conclude()
    return SearchResult(search.history, rows, validation)


def take_eval_rows(run: Run, settings: Search, seed: int, kind: str) -> tuple[Any, list[int], Any]:
    """Return the eval set, its rows to validate on, and the whole training set."""
    source, rows = find_eval_rows(run.trainer.eval_dataset, settings.val_samples, seed, kind)
    return source, rows, run.trainer.train_dataset


def take_training_rows(run: Run, settings: Search, seed: int, kind: str) -> tuple[Any, list[int], Any]:
    """Return the training set, its rows to validate on, and the rest of it."""
    source: Any = run.trainer.train_dataset
    check_indexable(source, "datasets")
    train_rows, rows = hold_out(source, settings.val_samples, find_least(run.trainer), seed, kind)
    return source, rows, take_rows(source, train_rows)


# By ``val_source``: functions that return the dataset to validate on, its rows, and the dataset to train on.
SOURCES = {"train": take_training_rows, "eval": take_eval_rows}


def check_search(run: Run, settings: Search, modules: dict[str, LoraLayer]) -> None:
    """Raise LayerselError if no search with gates on ``modules`` can be made in this run."""
    check_plain_lora(run, modules, SETTING)
    if trainers.generates(run.trainer):
        raise LayerselError(describe_generated(f"trainer: {type(run.trainer).__name__}", "flexora"))
    trainers.check_no_optimizer(run.trainer)
    if settings.hypergradient == "unrolled":
        if run.engine.is_streamed:
            raise LayerselError(describe_sharded(run.engine.name))
        check_attention(str(getattr(run.model.config, "_attn_implementation", None) or "eager"))


@contextlib.contextmanager
def leaving_out(run: Run, stack: LayerStack, taking_part: list[str]) -> Iterator[None]:
    """Train no LoRA weights of the stack within the block except for those of the modules ``taking_part``."""
    before = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    freeze_unselected(run, stack, taking_part)
    try:
        yield
    finally:
        for name, parameter in run.model.named_parameters():  # FSDP2 creates new parameters
            parameter.requires_grad_(name in before)


class GateSearch:
    """The state of a search: the gates, and the losses so far.

    α and its optimizer, Adam, are float64 on the CPU, the same on every process. The multipliers are fp32
    on the device, outside the engine.

    Attributes:
        alpha: (gates,), float64.
        kind: the kind of labels, see ``label_alignment``.
        history: the optimizer steps so far; training losses are those of this process until ``conclude``.
    """

    def __init__(
        self,
        run: Run,
        settings: Search,
        downs: dict[str, list[nn.Linear]],
        validation: ValidationBatches,
        choose: Callable[[dict[str, float]], list[str]],
        kind: str,
    ) -> None:
        self.trainer = run.trainer
        self.settings = settings
        self.validation = validation
        self.choose = choose
        self.kind = kind
        self.gates = Gates(downs, 1, run.device)
        self.alpha = torch.zeros(len(downs), dtype=torch.float64)
        self.adam = torch.optim.Adam([self.alpha], lr=settings.gate_lr)
        self.history = GateHistory(list(downs))
        self.largest_gradient = torch.zeros_like(self.alpha)
        self.losses: list[torch.Tensor] = []
        inner_steps = {"first_order": lambda: None, "unrolled": lambda: InnerSteps(run.trainer, self.gates)}
        self.inner = inner_steps[settings.hypergradient]()
        self.kept: list[str] | None = None
        self.unchanged = 0
        self.planned = run.trainer.args.max_steps  # of the run; not positive if its epochs determine them
        self.step_times = Pace(settings.steps)
        advice = "Lower `flexora.steps` to shorten it."
        shown = collectives.get_rank() == 0
        self.progress = PhaseProgress("the search", settings.steps, shown, self.find_training_time, advice)

    # --- Training -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the gates to the modules, and show progress, within the block."""
        self.gates.attach()
        self.hold_gates(True)
        try:
            with self.progress:
                yield
        finally:
            self.gates.detach()

    def start(self, train_dataloader: Any) -> None:
        """Follow the trainer from the start of its training, when its engine exists."""
        self.validation.follow(train_dataloader)
        upstream = self.trainer.training_step

        @functools.wraps(upstream)
        def training_step(model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            if self.inner:
                self.inner.add(inputs, num_items_in_batch)
            loss = upstream(model, inputs, num_items_in_batch)
            self.losses.append(loss)
            return loss

        self.trainer.training_step = training_step  # type: ignore[method-assign]  # within the trial
        if self.inner:
            self.inner.begin()

    def finish_step(self, step: int) -> bool:
        """Make the gate step after optimizer step ``step``, if one is due. Every process must call this.

        Returns:
            Whether the search can stop, because the choice has not changed for ``patience`` gate steps.
        """
        train_loss = float(torch.stack(self.losses).sum())
        self.step_times.add(1)
        self.losses.clear()
        if self.inner:
            self.inner.end_step()
        validation_loss, moved = None, step % self.settings.inner_steps == 0
        if moved:
            validation_loss = self.step_gates(step)
        self.history.add(train_loss, validation_loss, self.alpha.tolist())
        if validation_loss is not None:
            # Only after gate steps, because the steps between them take less time.
            losses = {"loss": train_loss, "validation": validation_loss}
            facts = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if math.isfinite(loss))
            self.progress.advance(self.settings.inner_steps, facts)
        self.step_times.skip()
        return moved and self.settings.patience is not None and self.has_settled()

    def find_training_time(self) -> float | None:
        """Return the seconds that the run's training will take by the steps so far, None if that is unknown."""
        each = self.step_times.find_seconds_per_work()
        return None if each is None or self.planned <= 0 else each * self.planned

    def has_settled(self) -> bool:
        """Return whether the choice is the same as after each of the last ``patience`` gate steps."""
        assert self.settings.patience is not None, "only a search with patience asks"
        kept = self.choose_by(-1)
        self.unchanged = self.unchanged + 1 if kept is not None and kept == self.kept else 0
        self.kept = kept
        return self.unchanged >= self.settings.patience

    def conclude(self) -> None:
        """Average the history over processes, and check the search. Every process must call this.

        Raises:
            LayerselError: if the search ended early, or no gradient reached some gates.
        """
        history = self.history
        stopped = self.unchanged >= (self.settings.patience or 1)
        if not history.gates or (len(history.gates) < self.settings.steps and not stopped):
            raise LayerselError(
                f"layersel.selection.flexora.val_samples: {self.settings.val_samples} leaves too few rows to train on: "
                f"the search ended after {len(history.gates)} of {self.settings.steps} steps. Lower val_samples, use "
                "`val_source: eval`, or make batches smaller."
            )
        losses = torch.tensor(history.train_losses, dtype=torch.float64, device=self.gates.values.device)
        collectives.average(losses)
        history.train_losses = losses.tolist()
        untouched = [name for name, largest in zip(history.names, self.largest_gradient) if largest == 0]
        if untouched:
            raise LayerselError(
                f"layersel.selection.method: flexora: no gradient reached the gate of {', '.join(untouched)}: the LoRA "
                "there did not train, or is computed past its modules. Raise flexora.steps or the learning rate, or "
                "look for fused LoRA code."
            )
        if collectives.get_rank() == 0 and not stopped and still_move(history):
            LOG.warning(
                "layersel: the search has not converged: in its last half the gates still move in one direction. The "
                "choice last changed after step %d of %d. Raise `flexora.steps`.",
                self.find_last_change(),
                len(history.gates),
            )

    def find_last_change(self) -> int:
        """Return the optimizer step after which the choice is that of the end."""
        final, steps = self.choose_by(-1), len(self.history.gates)
        return next((step for step in range(steps, 1, -1) if self.choose_by(step - 2) != final), 1)

    def choose_by(self, place: int) -> list[str] | None:
        """Return the choice by the gates of a step in the history, None if there was none yet."""
        try:
            return self.choose(dict(zip(self.history.names, self.history.gates[place])))
        except LayerselError:
            return None

    # --- Gates --------------------------------------------------------------------------------------------------------

    def hold_gates(self, held: bool) -> None:
        """Make the gates constants, as in LoRA steps, or not."""
        for gate in self.gates.leaves.values():
            gate.requires_grad_(not held)

    def step_gates(self, step: int) -> float:
        """Step the gates on the next validation micro-batches and return the loss. Every process must call this.

        Raises:
            LayerselError: if the loss or a gradient is not finite.
        """
        self.gates.clear_gradient()
        self.hold_gates(False)
        with self.frozen():
            batches = [self.validation.draw() for _ in range(self.settings.val_batches)]
            loss, targets = (
                self.inner.measure(batches, self.compute_loss) if self.inner else self.measure_first_order(batches)
            )
        self.hold_gates(True)
        # Each process has summed over its own labels; divide by the labels of all processes.
        sums = torch.cat([self.gates.gradient, loss.view(1), targets.view(1)])
        collectives.add_up(sums)
        gradient, loss, _ = (sums / sums[-1]).double().cpu().split([len(self.alpha), 1, 1])
        self.check_finite(gradient, loss, step)
        self.largest_gradient = torch.maximum(self.largest_gradient, gradient.abs())
        self.alpha.grad = find_alpha_gradient(self.alpha, gradient)
        self.adam.step()
        # Those of process 0: on nodes with other CPUs the last bits could differ, and with them the end of the search.
        gates = torch.cat([self.alpha, find_multipliers(self.alpha)]).to(self.gates.values.device)
        collectives.broadcast(gates)
        alpha, multipliers = gates.split(len(self.alpha))
        self.alpha.copy_(alpha)
        self.gates.values.copy_(multipliers)
        if self.inner:
            self.inner.begin()
        return float(loss)

    def check_finite(self, gradient: torch.Tensor, loss: torch.Tensor, step: int) -> None:
        """Raise LayerselError naming the first gate whose gradient is NaN or infinite."""
        if gradient.isfinite().all() and loss.isfinite().all():
            return
        bad = (~gradient.isfinite()).nonzero()
        where = f"the gradient of gate {self.history.names[int(bad[0])]}" if len(bad) else "the validation loss"
        raise LayerselError(
            f"layersel.selection.method: flexora: NaN or infinity in {where} after step {step} of the search. Lower "
            "the learning rate, look at the validation rows, and at the base model's precision (try bf16)."
        )

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Give no parameter a gradient, and turn off dropout and NEFTune, within the block.

        Modules that checkpoint their activations stay in training mode, because they only do so there.
        """
        model = trainers.get_model(self.trainer)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        training = [
            module
            for module in model.modules()
            if module.training and not getattr(module, "gradient_checkpointing", False)
        ]
        for parameter in trained:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True

    def compute_loss(self, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss summed over a micro-batch's labels, with a graph, and the number of labels."""
        inputs = trainers.prepare_inputs(self.trainer, inputs)
        targets = count_targets(inputs, self.kind)
        # The engine's own forward would start its reduction of gradients.
        loss = trainers.compute_loss(self.trainer, inputs) * targets
        return loss, torch.tensor(float(targets), device=self.gates.values.device)

    def measure_first_order(self, batches: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss summed over the labels of ``batches``, and their number; the gates get the gradient."""
        total, labels = torch.zeros(2, device=self.gates.values.device)
        for inputs in batches:
            with trainers.offload_activations(self.trainer):
                loss, targets = self.compute_loss(inputs)
                loss.backward()
            total, labels = total + loss.detach(), labels + targets
        return total, labels


class SearchCallback(TrainerCallback):
    """Starts and steps the search; it only delegates."""

    def __init__(self, search: GateSearch) -> None:
        self.search = search

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.search.start(kwargs["train_dataloader"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.search.finish_step(state.global_step):
            control.should_training_stop = True
