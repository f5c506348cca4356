"""Move LoRA rank between modules in training: gates, updates, checkpoints, and the plain adapter at the end."""

import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from axolotl_layersel.common.errors import LayerselError, warning_instead
from axolotl_layersel.common.paths import state_path
from axolotl_layersel.common.randomness import draw_row
from axolotl_layersel.config.experts import describe_gated_experts
from axolotl_layersel.config.l1ra import BUDGETS, L1RAConfig, check_movable, check_share
from axolotl_layersel.config.schedule import plan_updates
from axolotl_layersel.engines import collectives, edits, trainers
from axolotl_layersel.engines.moments import LEAVES_IDLE
from axolotl_layersel.l1ra.allocation import Moves
from axolotl_layersel.l1ra.capacity import Capacity
from axolotl_layersel.l1ra.components import Components
from axolotl_layersel.l1ra.records import RankHistory, describe_update
from axolotl_layersel.l1ra.rules import RULES, Rule
from axolotl_layersel.l1ra.state import (
    ADAPTER_PREFIX,
    EXPONENT,
    STEP,
    State,
    check_exponent,
    read_state,
    write_state,
)
from axolotl_layersel.lora import layouts
from axolotl_layersel.lora.factors import drop_unused, fold, split
from axolotl_layersel.lora.gates import Gates
from axolotl_layersel.lora.modules import count_component_parameters, find_key, get_linears, list_linear
from axolotl_layersel.lora.patterns import scale_by_rank
from axolotl_layersel.lora.resizing import describe_ranks, set_scaling
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.weights import get_initialisation, restore_adapter, restore_live_adapter

LOG = logging.getLogger("axolotl.layersel")
# Largest difference of a gate between processes that one step may add. All processes have the same averaged gradient,
# so only the rounding of a step differs: gate_lr is at most 0.4 and m at most 32·√v, which gives 0.4·32·2⁻²⁴.
ROUNDING = 2.0**-20


class RankRedistribution:
    """The ranks of a run's LoRA modules.

    Modules are built at ``max_rank``. An inactive component has a gate of 0 and a zero column in B, so it contributes
    nothing and gets no gradient. An update flips components and writes their rows and columns, in the same way on every
    process; it changes no others.

    Attributes:
        gates: gates of the trained linear modules, in the model's order.
        components: the state of their rank components.
        fixed: trained LoRA on expert parameters, by name, whose rank is fixed.
        history: ranks by step.
        rule: the rule that moves rank; unset before ``start``.
        exponent: how the scaling of a module follows its rank, see ``patterns.scale_by_rank``.
        starts: the scaling and the rank that each module starts with.
        is_folded: whether training has ended, and the modules are plain LoRA.
    """

    rule: Rule

    def __init__(self, run: Run, settings: L1RAConfig, capacity: Capacity, exponent: float = 0) -> None:
        self.run = run
        self.settings = settings
        self.exponent = exponent
        self.lora_r = capacity.lora_r
        trained = {
            name: module
            for name, module in run.lora_modules.items()
            if get_linears(module, run.adapter)[0].weight.requires_grad
        }
        self.modules = list_linear(trained)
        self.fixed = {name: trained[name] for name in trained if name not in self.modules}
        if self.fixed and not self.modules:
            raise LayerselError(describe_gated_experts("layersel.l1ra"))
        self.linears = {name: get_linears(module, run.adapter) for name, module in self.modules.items()}
        self.parameters_per_component = {
            name: count_component_parameters(module, run.adapter) for name, module in self.modules.items()
        }
        self.gates = Gates({name: [down] for name, (down, _) in self.linears.items()}, capacity.max_rank, run.device)
        costs = BUDGETS[settings.budget_unit](self.parameters_per_component)
        self.components = Components(self.gates, capacity.slots, costs, capacity.max_rank)
        ranks = self.components.ranks()
        self.starts = {name: (module.scaling[run.adapter], ranks[name]) for name, module in self.modules.items()}
        self.history = RankHistory({0: ranks})
        self.update_steps: set[int] = set()
        self.expect_gradients: set[str] = set()
        self.is_folded = False
        # Gates that stay at 1 need not be attached if A's gradients tell theirs.
        leaves_idle = capacity.library in LEAVES_IDLE
        self.is_attached = RULES[settings.rule].moves_gates or not (run.engine.keeps_gradients and leaves_idle)
        if self.is_attached:
            self.gates.attach()
        else:
            trainers.call_after_backward(run.trainer, self.read_gradient)

    def count_parameters(self) -> tuple[int, int]:
        """Return the numbers of LoRA parameters in use, and of those that the modules have room for."""
        in_use = sum(rank * self.parameters_per_component[name] for name, rank in self.components.ranks().items())
        room = sum(self.components.max_rank * count for count in self.parameters_per_component.values())
        fixed = self.count_fixed_parameters()
        return in_use + fixed, room + fixed

    def count_fixed_parameters(self) -> int:
        adapter = self.run.adapter
        return sum(count_component_parameters(each, adapter) * each.r[adapter] for each in self.fixed.values())

    def check_movable(self) -> None:
        """Raise LayerselError if rank could never move."""
        ranks, costs = self.components.ranks(), self.components.costs
        if not ranks:
            raise LayerselError("layersel.l1ra: no LoRA module trains, so there is no rank to move. Let some train.")
        check_movable(self.settings, ranks.values(), self.components.max_rank, len(ranks) > 1)
        check_share(self.settings, sum(rank * costs[name] for name, rank in ranks.items()), min(costs.values()))

    # --- Training -----------------------------------------------------------------------------------------------------

    def check_start(self, step: int) -> None:
        """Raise LayerselError if training begins at ``step`` with ranks that an earlier one has moved or folded."""
        if self.is_folded or (step == 0 and max(self.history.ranks) > 0):
            raise LayerselError(
                "layersel.l1ra: the trainer has trained before, and rank has moved since, so it cannot train anew. "
                "Build the model and the trainer anew and prepare them again, with `resume_from` to go on from a "
                "checkpoint."
            )

    def start(self, steps: int) -> None:
        """Schedule the updates of rank in a run of ``steps`` optimizer steps, and log them."""
        settings = self.settings
        self.update_steps = set(plan_updates(steps, settings))
        self.rule = RULES[settings.rule](settings, steps)
        if self.exponent and self.run.trainer.args.torch_compile:
            self.vary_scalings()
        if collectives.get_rank() == 0:
            self.announce(steps)
        collectives.decide_on_rank_zero(lambda: self.history.write(self.run.output_dir))

    def announce(self, steps: int) -> None:
        """Log the schedule, and the parameters in use: Axolotl's own count includes the room for rank."""
        in_use, capacity = self.count_parameters()
        LOG.info(
            "layersel: l1ra moves rank among %d modules after %d of %d steps, %s",
            len(self.modules),
            len(self.update_steps),
            steps,
            self.rule.describe(),
        )
        if self.exponent:
            LOG.info("layersel: the scaling of a module follows its rank with exponent %g", self.exponent)
        if (
            self.settings.last_update_ratio is None
            and max(self.update_steps) > self.settings.get("last_update_ratio") * steps
        ):
            LOG.info(
                "layersel: last_update_ratio is %.3g in place of %.3g by default, so that rank moves twice",
                max(self.update_steps) / steps,
                self.settings.get("last_update_ratio"),
            )
        LOG.info(
            "layersel: %s trainable LoRA parameters in use; %s counts the room for rank %d in every module",
            f"{in_use:,}",
            f"{capacity:,}",
            self.components.max_rank,
        )
        if self.fixed:
            LOG.info(
                "layersel: LoRA on experts, such as %s, stays at its rank: %s of these parameters",
                next(iter(self.fixed)),
                f"{self.count_fixed_parameters():,}",
            )

    def read_gradient(self) -> None:
        """Set the gradient of gates of 1 that are not attached; every process must call this.

        ∂L/∂c_i of B·diag(c)·A·x at c_i = 1 is Σ_j A_ij · ∂L/∂A_ij, which needs only the averaged gradient of A.
        """
        downs = [down.weight for down, _ in self.linears.values()]
        self.gates.gradient.copy_(self.run.engine.multiply_by_gradients(downs))

    def step(self, step: int, look: bool) -> None:
        """Step the gates after an optimizer step, and move rank if an update is due; every process must call this.

        Args:
            step: the optimizer step that has ended.
            look: whether to check that gates are finite, for which the host waits for the device. NaN persists, so a
                later check finds it too.

        Raises:
            LayerselError: if a gate is not finite, or the processes do not agree on the moves.
        """
        if self.is_attached:
            self.gates.average_gradient()
        self.rule.step(self.components)
        self.gates.clear_gradient()
        if look or step in self.update_steps:
            self.check_finite(step)
        if step in self.update_steps:
            self.update(step)

    def check_finite(self, step: int) -> None:
        # The second moment also shows a gradient whose square overflowed.
        bad = ~(self.gates.values.isfinite() & self.components.exp_avg_sq.isfinite())
        if bad.any():
            name = self.gates.name_component(int(bad.nonzero()[0]))
            raise LayerselError(
                f"layersel.l1ra: a gate of {name} is NaN or infinite after step {step}. The run stops; the last "
                "checkpoint is good. Lower learning_rate, or check the data and the precision."
            )

    def update(self, step: int) -> None:
        """Move rank after optimizer step ``step``, and log and record the ranks."""
        self.settle(step)
        self.check_gradients(step)
        moves = self.rule.decide(self.components, step)
        self.apply(moves, step)
        ranks = self.history.ranks[step] = self.components.ranks()
        numbers = describe_update(
            ranks, self.parameters_per_component, self.components.pool, moves.count_pruned(), moves.count_added()
        )
        numbers["layersel/trainable_parameters_in_use"] += self.count_fixed_parameters()
        # Trainer.log clears the flag that makes the Trainer log the loss of this step.
        trainer = self.run.trainer
        should_log = trainer.control.should_log
        trainer.log(numbers)
        trainer.control.should_log = should_log
        self.record(step)

    def record(self, step: int) -> None:
        """Write the ranks by step, up to ``step``, to the run's folder, or log a warning: training must not be lost."""
        if collectives.get_rank() == 0:
            failure = f"the ranks of step {step} cannot be recorded"
            with warning_instead(failure, "The run goes on; its checkpoints have them."):
                self.history.write(self.run.output_dir)

    def check_gradients(self, step: int) -> None:
        """Raise LayerselError if a module trains but its gates get no gradient; every process must call this.

        Then something bypasses the module, and its gates have no effect. While B is zero so is every gradient. Hence
        the error is raised only for modules whose B was nonzero at the previous update.
        """
        if self.settings.gate_lr == 0:
            return
        without = [name for name, part in self.gates.parts.items() if not self.components.exp_avg_sq[part].any()]
        late = [name for name in without if name in self.expect_gradients]
        if late:
            raise LayerselError(
                f"layersel.l1ra: {late[0]} trains, but no gradient has reached its gates in {step} steps "
                f"({len(late)} such modules). Something bypasses the LoRA modules: remove fused kernels, or remove "
                "these modules from lora_target_modules."
            )
        self.run.engine.reshard()
        ups = {name: self.linears[name][1].weight for name in without}
        self.expect_gradients = {name for name, up in ups.items() if self.run.engine.gather_parameter(up).any()}

    def apply(self, moves: Moves, step: int, training: bool = True) -> None:
        """Flip the components of ``moves`` and write their rows and columns; every process must call this.

        ``training``: whether the optimizer will step again and its moments matter. After the last step an engine that
        has loaded the best model may hold none.
        """
        self.check_agreement(moves, step)
        engine = self.run.engine
        engine.reshard()
        emptied: list[int] = []
        filled: list[int] = []
        for name, part in self.gates.parts.items():
            pruned, added = moves.pruned.get(name, ()), moves.added.get(name, ())
            changed = torch.tensor(sorted({*pruned, *added}), dtype=torch.long)
            if not len(changed):
                continue
            down, up = (linear.weight for linear in self.linears[name])
            rows = {slot: self.draw_row(name, slot, step) if slot in added else 0.0 for slot in changed.tolist()}
            # A new component starts from a random row of A and a zero column of B, a pruned one is all zero.
            engine.edit_parameter(down, edits.write_rows(rows))
            engine.edit_parameter(up, edits.fill(changed, 1, 0))
            if training:
                engine.zero_moments(down, changed, dim=0)
                engine.zero_moments(up, changed, dim=1)
            emptied += (part.start + changed).tolist()
            filled += [part.start + slot for slot in added]
        self.components.flip(emptied, filled)
        self.components.pool = moves.pool
        self.follow_ranks(training)

    def follow_ranks(self, training: bool) -> None:
        """Let the scalings follow the ranks, and rescale B so that s·B·A stays; every process must call this.

        ``training``: see ``apply``.
        """
        engine, changed = self.run.engine, self.find_changed_scalings()
        for name, scaling in changed.items():
            up = self.linears[name][1].weight
            factor = self.modules[name].scaling[self.run.adapter] / scaling
            engine.edit_parameter(up, edits.multiply(factor))
            if training:  # ∂L/∂B is proportional to the scaling, ∂L/∂A to s·B, which stays
                engine.scale_moments(up, 1 / factor)
        self.set_scalings(changed)

    def find_changed_scalings(self) -> dict[str, float]:
        """Return the scalings that modules must have at their ranks, by module, where they have another."""
        ranks, adapter = self.components.ranks(), self.run.adapter
        scalings = {
            name: scale_by_rank(scaling, rank, ranks[name], self.exponent)
            for name, (scaling, rank) in self.starts.items()
        }
        return {name: new for name, new in scalings.items() if new != self.modules[name].scaling[adapter]}

    def vary_scalings(self) -> None:
        """Change all scalings by their last bit, which fp32 rounds away, until the first update corrects them.

        torch.compile (2.13.0) compiles again when a number changes for the first time, and from then on takes it as an
        input. Otherwise every update would compile again, for the modules that it is the first one to change.
        """
        adapter = self.run.adapter
        self.set_scalings(
            {name: math.nextafter(module.scaling[adapter], math.inf) for name, module in self.modules.items()}
        )

    def set_scalings(self, scalings: Mapping[str, float]) -> None:
        """Set the scalings of modules, but not their weights."""
        for name, scaling in scalings.items():
            set_scaling(self.modules[name], self.run.adapter, scaling)
        if scalings:
            adapter = self.run.adapter
            self.run.model.peft_config[adapter] = describe_ranks(self.run.config, self.run.lora_modules, adapter)

    def settle(self, step: int) -> None:
        """Copy process 0's gates and moments to every process; every process must call this.

        Their last bits differ between nodes with different processors, and could make one process prune a component
        that another keeps.

        Raises:
            LayerselError: on every process, if gates differ by more than rounding.
        """
        shared = torch.stack([self.gates.values, self.components.exp_avg, self.components.exp_avg_sq])
        collectives.broadcast(shared)
        apart = (self.gates.values - shared[0]).abs()
        farthest = int(apart.argmax())
        found = collectives.gather_from_all((float(apart.max()), farthest, float(self.gates.values[farthest])))
        before = max((update for update in self.update_steps if update < step), default=0)
        allowed = ROUNDING * max(step - before, 1)
        differing = [process for process, (distance, _, _) in enumerate(found) if not distance <= allowed]
        if differing:
            _, component, value = found[differing[0]]
            name = self.gates.name_component(component)
            self.refuse(
                differing,
                step,
                f"gate {component - self.gates.parts[name].start} of {name} is {value:.8g} on process {differing[0]} "
                f"and {float(shared[0, component]):.8g} on process 0; rounding explains {allowed:.1g}",
            )
        for tensor, values in zip((self.gates.values, self.components.exp_avg, self.components.exp_avg_sq), shared):
            tensor.copy_(values)

    def check_agreement(self, moves: Moves, step: int) -> None:
        """Raise LayerselError on every process unless all processes decide the same moves of the same components."""
        content = (
            repr(moves).encode()
            + self.components.active.cpu().numpy().tobytes()
            + self.components.steps.cpu().numpy().tobytes()
        )
        differing = collectives.find_differing_ranks(hashlib.sha256(content).digest())
        if differing:
            self.refuse(differing, step, "they would move different components although their gates are the same")

    def refuse(self, processes: list[int], step: int, difference: str) -> None:
        """Raise LayerselError for ``processes`` whose state differs from that of process 0."""
        raise LayerselError(
            f"layersel.l1ra: after step {step}, processes {processes} computed different gates or rank updates than "
            f"process 0: {difference}. Continuing would let their adapters diverge. The run stops; the last checkpoint "
            "is good. The machine or the communication library is at fault, not a setting: resume, and report it if it "
            "happens again."
        )

    def draw_row(self, module: str, slot: int, step: int) -> torch.Tensor:
        """Return the initial row of A of a component that is added after ``step``, (inputs,), fp32."""
        method = get_initialisation(self.run.config)
        like = torch.empty(self.linears[module][0].in_features)
        return draw_row(like, method, self.run.trainer.args.seed, f"{module}\0{step}", slot, self.lora_r)

    def finish(self, step: int) -> None:
        """Prune a last time, and fold the gates into plain LoRA modules; every process must call this."""
        self.settle(step)
        closed = [name for name, part in self.gates.parts.items() if not self.gates.values[part].any()]
        self.apply(self.rule.decide_last(self.components), step, training=False)
        self.history.ranks[step] = self.components.ranks()
        for name, part in self.gates.parts.items():
            self.run.engine.edit_parameter(
                self.linears[name][1].weight, edits.multiply_columns(self.gates.values[part].clone())
            )
        self.gates.values.copy_(self.components.active)
        self.gates.detach()
        self.is_folded = True
        self.record(step)
        if collectives.get_rank() == 0 and closed:
            LOG.warning(
                "layersel: all gates of %d of %d modules ended at 0, such as those of %s: these modules "
                "contribute nothing. If they are many, lower l1_lambda.",
                len(closed),
                len(self.modules),
                closed[0],
            )

    # --- Files --------------------------------------------------------------------------------------------------------

    def fold(self, tensors: dict[str, torch.Tensor], config: LoraConfig) -> tuple[dict[str, torch.Tensor], LoraConfig]:
        """Return the plain adapter that computes the same as the gated modules, see ``layouts.lay_out``."""
        factors, rest = split(tensors)
        values, adapter = self.gates.values.cpu(), self.run.adapter
        modules = self.run.lora_modules
        linear = list_linear(modules)
        folded, fixed = {}, {}
        for name, pair in factors.items():
            part = self.gates.parts.get(name)
            gates = None if part is None else values[part]
            plain = fold(pair, modules[name].scaling[adapter], gates)
            if name in linear:
                folded[name] = drop_unused(plain)
            else:  # expert parameters keep their rank
                rest |= layouts.join({name: plain})
                fixed[find_key(name, modules[name])] = modules[name].r[adapter]
        return layouts.lay_out(folded, rest, config, "ragged", fixed)

    def save(self, checkpoint: str | Path, weights: dict[str, torch.Tensor]) -> None:
        """Write the state for resuming into ``checkpoint``, on process 0. ``weights``: see ``AdapterWriter.save``."""
        metadata = {
            STEP: str(self.run.trainer.state.global_step),
            "settings": self.settings.model_dump_json(),
            "max_rank": str(self.components.max_rank),
            "modules": json.dumps(list(self.modules)),
            "pool": str(self.components.pool),
            EXPONENT: repr(self.exponent),
        }
        write_state(checkpoint, weights, self.components.list_tensors(), self.history, metadata)

    def restore(self, checkpoint: str | Path) -> None:
        """Restore gates, ranks and their history from ``checkpoint``, from which the run resumes."""
        self.history = self.restore_gates(checkpoint, "resume_from_checkpoint").history

    def restore_gates(self, checkpoint: str | Path, key: str) -> State:
        """Restore gates, moments, active components, pool and scalings from ``checkpoint``, and return its state.

        Raises:
            LayerselError: naming ``key``, if the checkpoint is damaged or of another run.
        """
        state = collectives.decide_on_rank_zero(lambda: self.read(checkpoint, key))
        self.components.pool = state.pool
        for name, tensor in self.components.list_tensors().items():
            tensor.copy_(state.gates[name])
        self.set_scalings(self.find_changed_scalings())
        return state

    def check(self, checkpoint: str | Path, key: str) -> None:
        """Raise LayerselError on every process unless ``checkpoint`` is of this run."""
        collectives.decide_on_rank_zero(lambda: bool(self.read(checkpoint, key)))

    def read(self, checkpoint: str | Path, key: str) -> State:
        state = read_state(checkpoint, self.settings, key)
        check_exponent(state, self.exponent, checkpoint)
        if state.modules != list(self.modules) or state.max_rank != self.components.max_rank:
            raise LayerselError(
                f"{key}: {state_path(checkpoint)} is of a run with LoRA on other modules, or with room for rank "
                f"{state.max_rank} in each, not {self.components.max_rank}. Resume a checkpoint of this run."
            )
        return state

    def load_adapter(self, upstream: Callable) -> Callable:
        """Return a replacement of the model's ``load_adapter``, which cannot load ragged ranks into grown modules."""

        @functools.wraps(upstream)
        def load_adapter(model: PeftModel, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
            path = state_path(model_id)
            if model is not self.run.model or adapter_name != self.run.adapter or not path.exists():
                return upstream(model, model_id, adapter_name, *args, **kwargs)
            restore_adapter(self.run, path, ADAPTER_PREFIX)
            return None

        return load_adapter

    def restore_weights(self, checkpoint: str | Path) -> None:
        """Load the LoRA weights of ``checkpoint`` into the model in training; every process must call this."""
        restore_live_adapter(self.run, state_path(checkpoint), ADAPTER_PREFIX)
