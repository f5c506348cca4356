"""Axolotl plugins that record, from inside a run, what the tests assert on.

They change nothing, unless the environment variable ``LAYERSEL_TEST_SIGNAL`` says so:

* ``"KILL:3"`` sends every process SIGKILL at the end of step 3;
* ``"INT:3"`` sends only process 0 SIGINT, as an impatient scheduler might; ``"TERM:3"`` sends it SIGTERM;
* ``"TERMALL:3"`` sends SIGTERM to every process and its children, as a launcher does;
* ``"DIE:3"`` kills only the last process, ``"STOP:3"`` stops it until process 0 has ended, and then kills it;
* ``"SAVETERM:4"`` sends SIGTERM to the last process while checkpoint 4 is written;
* ``"SCOREINT:1"`` and ``"SCORETERM:1"`` send process 0 the signal in the first round of scoring;
* ``"SEARCHINT:3"`` and ``"SEARCHTERM:3"`` send it to process 0 and its children in step 3 of a search,
  ``"SEARCHKILL:3"`` sends every process SIGKILL there;
* ``"DRIFT:3"`` changes one gate on process 1 only, ``"BIT:3"`` the last bit of all its gates;
* ``"NAN:3"`` puts a NaN into a LoRA weight before step 3;
* ``"BYPASS:0"`` computes the LoRA of one module without calling the module;
* ``"UNGATHERED:3"`` reads weights from step 3 on without gathering them;
* ``"QUANTISED:0"`` gives the model a weight in an 8-bit type of torchao's, and may follow another after a comma.
"""

import gc
import json
import os
import signal
import subprocess
import weakref
from pathlib import Path

import bitsandbytes
import deepspeed
import torch
from axolotl.integrations.base import BasePlugin
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torchao.quantization import Float8Tensor
from transformers import TrainerCallback

from axolotl_layersel.engines import collectives, find_engine, list_classes
from axolotl_layersel.engines.base import Engine
from axolotl_layersel.engines.moments import unwrap_optimizer
from axolotl_layersel.l1ra.callback import RankCallback
from axolotl_layersel.lora.kernels import is_fused
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.weights import adapter_parameters
from axolotl_layersel.selection.methods.flexora import search
from axolotl_layersel.selection.methods.flexora.search import GateSearch
from axolotl_layersel.selection.passes import forward
from axolotl_layersel.selection.select import make_plan
from axolotl_layersel.selection.types import Selection
from helpers.support import make_selection_config

TOKENS = torch.arange(40).reshape(2, 20) + 300


def count_optimized(trainer) -> int:
    """Return the number of parameters in the engine's own optimizer, over the shards of all processes."""
    engine = find_engine(trainer).name
    if engine in ("zero1", "zero2"):
        return sum(p.numel() for group in trainer.model_wrapped.optimizer.bit16_groups for p in group)
    if engine == "zero3":
        return sum(p.ds_numel for group in trainer.model_wrapped.optimizer.fp16_groups for p in group)
    return sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])


def is_offloaded(module) -> bool:
    """Return whether FSDP2 keeps the shards of a module on the CPU, torch 2.13.0."""
    group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
    return group is not None and all(parameter.offload_to_cpu for parameter in group.fsdp_params)


def measure_quantised(model) -> dict[str, int]:
    """Return the number of 4-bit weights in the model, and the bytes of this process's part of them."""
    modules = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    held = [getattr(module.weight, "_local_tensor", module.weight) for module in modules]
    assert all(isinstance(weight, bitsandbytes.nn.Params4bit) and weight.bnb_quantized for weight in held)
    return {
        "weights": sum(weight.quant_state.shape.numel() for weight in held),
        "bytes": sum(weight.numel() * weight.element_size() for weight in held),
    }


class ProbeCallback(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer
        self.folder = Path(trainer.args.output_dir)

    def on_train_begin(self, args, state, control, **kwargs):
        self.watch_saves()
        engine = find_engine(self.trainer)
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        parameters = adapter_parameters(model)
        weights = {name: engine.gather_parameter(p).contiguous() for name, p in parameters.items()}
        if engine.name == "fsdp2":
            # The tensors of the optimizer are shards, even if the model holds whole weights later.
            self.shards = {name: p for name, p in parameters.items() if p.requires_grad}
            held = [id(p) for group in self.trainer.optimizer.param_groups for p in group["params"]]
            assert {id(p) for p in self.shards.values()} == set(held)
            record = {"parameters": len(held), "different": len(set(held))}
            (self.folder / f"optimizer_{args.process_index}.json").write_text(json.dumps(record))
        if args.process_index == 0:
            save_file(weights, self.folder / f"weights_at_{state.global_step}.safetensors")
            record = json.loads((self.folder / "engine.json").read_text())
            record["optimized"] = count_optimized(self.trainer)
            record["offloaded"] = any(map(is_offloaded, model.modules()))
            record["quantised"] = measure_quantised(model)
            record["checkpointed"] = sum(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            record["fused_modules"] = sum(any(map(is_fused, vars(module).values())) for module in model.modules())
            (self.folder / "engine.json").write_text(json.dumps(record))

        if "QUANTISED:0" in os.environ.get("LAYERSEL_TEST_SIGNAL", ""):
            weight = Float8Tensor.from_hp(torch.ones(16, 16), float8_dtype=torch.float8_e4m3fn)
            model.register_parameter("quantised", torch.nn.Parameter(weight, requires_grad=False))

    def on_save(self, args, state, control, **kwargs):
        """Write the gathered shards of FSDP2 next to each checkpoint."""
        if find_engine(self.trainer).name == "fsdp2":
            whole = {name: shards.full_tensor().detach().contiguous() for name, shards in self.shards.items()}
            if args.process_index == 0:
                save_file(whole, self.folder / f"checkpoint-{state.global_step}" / "shards.safetensors")

    def watch_saves(self):
        upstream = self.trainer.save_model

        def save_model(output_dir=None, _internal_call=False):
            wanted = os.environ.get("LAYERSEL_TEST_SIGNAL", "") == f"SAVETERM:{self.trainer.state.global_step}"
            if wanted and collectives.get_rank() == self.trainer.args.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return upstream(output_dir, _internal_call)

        self.trainer.save_model = save_model
        tokenizer = self.trainer.processing_class
        write = tokenizer.save_pretrained

        def save_pretrained(folder, *args, **kwargs):
            # Axolotl itself writes it to the run's folder, before training and on all processes.
            if Path(folder).name.startswith("checkpoint-"):
                (self.folder / f"tokenizer_written_by_{collectives.get_rank()}").touch()
            return write(folder, *args, **kwargs)

        tokenizer.save_pretrained = save_pretrained

    def on_step_end(self, args, state, control, **kwargs):
        name, _, step = os.environ.get("LAYERSEL_TEST_SIGNAL", "").partition(",")[0].partition(":")
        if name == "KILL" and state.global_step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        if name in ("INT", "TERM") and state.global_step == int(step) and args.process_index == 0:
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        if name in ("DIE", "STOP") and state.global_step == int(step):
            lose_last_rank(name)
        if name == "TERMALL" and state.global_step == int(step):
            os.killpg(0, signal.SIGTERM)
        if name == "UNGATHERED" and state.global_step == int(step):
            for kind in list_classes():
                kind.gather_parameter = Engine.gather_parameter


def lose_last_rank(way: str) -> None:
    """End the last process, or stop it; every process calls this."""
    pids = collectives.gather_from_all(os.getpid())
    if os.getpid() != pids[-1]:
        return
    if way == "STOP":
        subprocess.Popen(["sh", "-c", f"while kill -0 {pids[0]}; do sleep 0.1; done; kill -9 {pids[-1]}"])
    os.kill(os.getpid(), signal.SIGKILL if way == "DIE" else signal.SIGSTOP)


def collect_gradients(trainer) -> list[torch.Tensor]:
    """Return copies of all gradients: of parameters, and in the buffers of DeepSpeed's optimizer."""
    found = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    optimizer = getattr(trainer.model_wrapped, "optimizer", None)
    waiting = [value for name, value in vars(optimizer).items() if "grad" in name or "ipg" in name] if optimizer else []
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        elif type(value).__module__.startswith("deepspeed") and hasattr(value, "__dict__"):
            waiting.extend(vars(value).values())
    return [(tensor.to_local() if hasattr(tensor, "to_local") else tensor).clone() for tensor in found]


def watch_search(trainer) -> None:
    """Record in gate_steps.json what each gate step of a search changes."""
    upstream_step, upstream_finish = GateSearch.step_gates, GateSearch.finish_step
    record = []

    def step_gates(search, step):
        before = collect_gradients(trainer)
        loss = upstream_step(search, step)
        after = collect_gradients(trainer)
        same = len(before) == len(after) and all(torch.equal(one, two) for one, two in zip(before, after))
        record.append({"step": step, "gradients_are_as_before": same, "gradients": len(before)})
        (Path(trainer.args.output_dir) / f"gate_steps_{trainer.args.process_index}.json").write_text(json.dumps(record))
        return loss

    def finish_step(search, step):
        name, _, fatal = os.environ.get("LAYERSEL_TEST_SIGNAL", "").partition(":")
        if name == "SEARCHKILL" and step == int(fatal):
            os.kill(os.getpid(), signal.SIGKILL)
        if name in ("SEARCHINT", "SEARCHTERM") and step == int(fatal) and collectives.get_rank() == 0:
            os.killpg(0, getattr(signal, name.replace("SEARCH", "SIG")))
        return upstream_finish(search, step)

    GateSearch.step_gates, GateSearch.finish_step = step_gates, finish_step


def watch_scoring() -> None:
    """Send process 0 a signal in a round of scoring, if the environment says so."""
    name, _, fatal = os.environ.get("LAYERSEL_TEST_SIGNAL", "").partition(":")
    if name not in ("SCOREINT", "SCORETERM"):
        return
    upstream, rounds = forward.stop_if_signalled, []

    def stop_if_signalled(device):
        rounds.append(device)
        if len(rounds) == int(fatal) and collectives.get_rank() == 0:
            os.kill(os.getpid(), getattr(signal, name.replace("SCORE", "SIG")))
        upstream(device)

    forward.stop_if_signalled = stop_if_signalled


def refer_to_engine(trainer) -> dict[str, weakref.ref]:
    """Return weak references to an engine, its optimizers, fp32 masters and moments."""
    wrapped = trainer.model_wrapped
    layers = [wrapped if wrapped is not trainer.model else None, trainer.optimizer]
    while layers[-1] is not None and hasattr(layers[-1], "optimizer"):
        layers.append(layers[-1].optimizer)  # accelerate's wrapper, DeepSpeed's ZeRO optimizer, Adam
    held = {f"{type(layer).__name__} {i}": layer for i, layer in enumerate(layers) if layer is not None}
    for i, (parameter, moments) in enumerate(layers[-1].state.items()):
        if all(parameter is not own for own in trainer.model.parameters()):
            held[f"master {i}"] = parameter
        held.update({f"{name} {i}": value for name, value in moments.items() if torch.is_tensor(value)})
    return {name: weakref.ref(value) for name, value in held.items()}


def watch_release(trainer) -> None:
    """Record the parts of a search's engine, and which of them still exist after the search."""
    upstream_trial, upstream_finish = search.run_trial, GateSearch.finish_step
    held = {}

    def finish_step(gate_search, step):
        held.update(refer_to_engine(trainer))
        return upstream_finish(gate_search, step)

    def run_trial(*args):
        upstream_trial(*args)
        gc.collect()
        record = {"held": sorted(held), "alive": sorted(name for name, ref in held.items() if ref() is not None)}
        path = Path(trainer.args.output_dir) / f"released_{trainer.args.process_index}.json"
        path.write_text(json.dumps(record))

    GateSearch.finish_step, search.run_trial = finish_step, run_trial


class ProbePlugin(BasePlugin):
    recorded = False

    def post_trainer_create(self, cfg, trainer):
        """Listed before the plugin under test, which searches here."""
        watch_search(trainer)
        watch_release(trainer)
        watch_scoring()

    def add_callbacks_post_trainer(self, cfg, trainer):
        return [ProbeCallback(trainer)]

    def post_train(self, cfg, model):
        """Write the logits of the model in training; Axolotl calls this again without a process group."""
        if self.recorded:
            return
        self.recorded = True
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=TOKENS).logits
        if collectives.get_rank() == 0:
            save_file({"logits": logits.float().contiguous()}, Path(cfg.output_dir) / "logits.safetensors")


def find_ranks(trainer):
    """Return the object that redistributes the run's rank, or None."""
    return next((c.ranks for c in trainer.callback_handler.callbacks if isinstance(c, RankCallback)), None)


def gather_moment(trainer, parameter, moment: str) -> torch.Tensor:
    """Return the whole values of one of Adam's moments of a parameter, on every process."""
    if not find_engine(trainer).name.startswith("zero"):
        value = compute_moment(trainer.optimizer.state[parameter], moment)
        return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
    zero = trainer.model_wrapped.optimizer
    whole = torch.zeros(find_engine(trainer).find_shape(parameter))
    if hasattr(parameter, "ds_id"):
        group, start, count = zero.grad_position[zero.get_param_id(parameter)]
        part = compute_moment(zero.optimizer.state[zero.fp32_partitioned_groups_flat[group]], moment)
        return zero._fp32_state_allgather(parameter, part.narrow(0, start, count)).clone()
    mapping = parameter._hp_mapping
    if mapping is not None:
        held, place = mapping.hp_fragment_address, mapping.lp_fragment_address
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        part = compute_moment(zero.optimizer.state[flat], moment).narrow(0, held.start, held.numel)
        whole.view(-1).narrow(0, place.start, place.numel).copy_(part)
    torch.distributed.all_reduce(whole)
    return whole


def describe_optimizer(trainer) -> dict:
    """Return the optimizer's class, its kind in bitsandbytes, and the number of weights with quantised moments."""
    optimizer = unwrap_optimizer(trainer.optimizer)
    kind = f"bits {optimizer.args.optim_bits}{', paged' * optimizer.is_paged}" if hasattr(optimizer, "is_paged") else ""
    coded = 0
    for state in optimizer.state.values():
        moment = state["state1"] if "state1" in state else state["exp_avg"]
        moment = moment.to_local() if isinstance(moment, DTensor) else moment
        coded += moment.dtype == torch.uint8 or hasattr(moment, "codes")
    return {"class": f"{type(optimizer).__module__}.{type(optimizer).__name__}", "kind": kind, "coded": coded}


def compute_moment(state: dict, moment: str) -> torch.Tensor:
    """Return the values of a moment in an optimizer's state, dequantised by its own library."""
    number = {"exp_avg": "1", "exp_avg_sq": "2"}[moment]
    if f"absmax{number}" in state:
        codes, scales, numbers = (state[f"{name}{number}"] for name in ("state", "absmax", "qmap"))
        return bitsandbytes.functional.dequantize_blockwise(codes, absmax=scales, code=numbers, blocksize=256)
    value = state[f"state{number}"] if f"state{number}" in state else state[moment]
    if not isinstance(value, DTensor):
        return value.dequantize() if type(value).__name__.startswith("OptimState") else value
    local = compute_moment({moment: value.to_local()}, moment)
    return DTensor.from_local(local, value.device_mesh, value.placements, shape=value.shape, stride=value.stride())


def by_component(tensor: torch.Tensor, side: str) -> torch.Tensor:
    """Return A, or B transposed: one row per component."""
    return tensor if side == "lora_A" else tensor.T


# By kind of value: the power of its scaling that a value of B is proportional to.
POWERS = {"weight": -1, "master": -1, "exp_avg": 1, "exp_avg_sq": 2}


class RankProbe(TrainerCallback):
    """Records every update of ranks, and the weights in the first forward pass after it."""

    def __init__(self, trainer, ranks):
        self.trainer, self.ranks = trainer, ranks
        self.folder = Path(trainer.args.output_dir)
        self.tensors, self.gates, self.waiting = {}, {}, {}
        self.survivors, self.collectives, self.rescaled = 0.0, {}, {}
        self.upstream_apply, ranks.apply = ranks.apply, self.apply
        for name, module in ranks.modules.items():
            for side in ("lora_A", "lora_B"):
                linear = getattr(module, side)[ranks.run.adapter]
                linear.register_forward_hook(lambda linear, *_, name=name, side=side: self.see(name, side, linear))

    def see(self, name, side, linear):
        for key in self.waiting.pop((name, side), []):
            self.tensors[f"{key}/{side}/seen"] = linear.weight.detach().clone()

    def collect(self):
        """Return every LoRA weight and moment of the run."""
        state = {}
        for name, module in self.ranks.modules.items():
            for side in ("lora_A", "lora_B"):
                weight = getattr(module, side)[self.ranks.run.adapter].weight
                state[name, side, "weight"] = find_engine(self.trainer).gather_parameter(weight)
                if find_engine(self.trainer).name.startswith("zero"):
                    state[name, side, "master"] = deepspeed.utils.safe_get_full_fp32_param(weight).clone().cpu()
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[name, side, moment] = gather_moment(self.trainer, weight, moment).cpu()
        return state

    def read_scalings(self):
        return {name: module.scaling[self.ranks.run.adapter] for name, module in self.ranks.modules.items()}

    def apply(self, moves, step, training=True):
        if not training:
            return self.upstream_apply(moves, step, training)
        self.gates[step] = {
            name: list(module.gates.values()) for name, module in self.ranks.components.describe_modules().items()
        }
        before, scalings = self.collect(), self.read_scalings()
        with CommDebugMode() as communication:
            self.upstream_apply(moves, step, training)
        self.collectives[step] = communication.get_total_counts()
        after, now = self.collect(), self.read_scalings()
        self.rescaled[step] = sum(now[name] != scalings[name] for name in now)
        for (name, side, kind), value in after.items():
            changed = sorted({*moves.pruned.get(name, ()), *moves.added.get(name, ())})
            kept = [i for i in range(self.ranks.components.max_rank) if i not in changed]
            # A scaling that follows the rank changes B by the inverse factor, and its moments with its gradient.
            factor = (now[name] / scalings[name]) ** POWERS[kind] if side == "lora_B" else 1.0
            expected = by_component(before[name, side, kind], side)[kept] * factor
            difference = (by_component(value, side)[kept] - expected).abs()
            self.survivors = max(self.survivors, float(difference.max()))
            if changed:
                key = f"{step}/{name}"
                self.tensors[f"{key}/{side}/{kind}"] = by_component(value, side)[changed].contiguous()
                if kind == "weight":
                    self.waiting[name, side] = [key]
        for name, slots in moves.added.items():
            drawn = {slot: self.ranks.draw_row(name, slot, step) for slot in slots}
            self.tensors[f"{step}/{name}/drawn"] = torch.stack(list(drawn.values()))
        changes = {
            name: sorted({*moves.pruned.get(name, ()), *moves.added.get(name, ())}) for name in self.ranks.modules
        }
        self.gates[f"changed {step}"] = {name: slots for name, slots in changes.items() if slots}
        self.gates[f"added {step}"] = {name: list(slots) for name, slots in moves.added.items()}

    def on_step_end(self, args, state, control, **kwargs):
        name, _, step = os.environ.get("LAYERSEL_TEST_SIGNAL", "").partition(":")
        if name == "DRIFT" and state.global_step == int(step) and args.process_index == 1:
            self.ranks.gates.values[0] *= 0.5
        if name == "BIT" and state.global_step == int(step) and args.process_index == 1:
            gates = self.ranks.gates.values
            gates.copy_(torch.nextafter(gates, torch.zeros_like(gates)))

    def on_step_begin(self, args, state, control, **kwargs):
        name, _, step = os.environ.get("LAYERSEL_TEST_SIGNAL", "").partition(":")
        if name == "NAN" and state.global_step == int(step) - 1:
            module = next(iter(self.ranks.modules.values()))
            module.lora_B[self.ranks.run.adapter].weight.data[0, 0] = float("nan")

    def on_save(self, args, state, control, **kwargs):
        """Write the logits of the model in training at each checkpoint."""
        model = self.trainer.model
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=TOKENS).logits
        model.train()
        if args.process_index == 0:
            folder = self.folder / f"checkpoint-{state.global_step}"
            save_file({"logits": logits.float().contiguous()}, folder / "logits.safetensors")

    def on_train_end(self, args, state, control, **kwargs):
        if os.environ.get("LAYERSEL_TEST_SIGNAL", "").startswith("BIT"):
            weights = adapter_parameters(self.ranks.run.model)
            save_file(
                {name: weight.detach().contiguous() for name, weight in weights.items()},
                self.folder / f"end_{args.process_index}.safetensors",
            )
        if args.process_index == 0:
            save_file(self.tensors, self.folder / "rows.safetensors")
            record = {"gates": self.gates, "survivors_changed_by": self.survivors, "collectives": self.collectives}
            record.update(optimizer=describe_optimizer(self.trainer), rescaled=self.rescaled)
            (self.folder / "ranks.json").write_text(json.dumps(record))


def bypass(module, hidden):
    """Compute a LoRA module as fused kernels do, from its matrices only."""
    matrices = module.lora_A["default"].weight.T @ module.lora_B["default"].weight.T
    return module.base_layer(hidden) + hidden @ matrices * module.scaling["default"]


class RankProbePlugin(BasePlugin):
    """Listed after the plugin under test."""

    def post_trainer_create(self, cfg, trainer):
        ranks = find_ranks(trainer)
        if ranks is not None and os.environ.get("LAYERSEL_TEST_SIGNAL") == "BYPASS:0":
            module = next(iter(ranks.modules.values()))
            module.forward = lambda hidden: bypass(module, hidden)
        if ranks is not None:
            trainer.add_callback(RankProbe(trainer, ranks))


class MethodsPlugin(BasePlugin):
    """Chooses with each method in ``LAYERSEL_TEST_METHODS`` before the run itself chooses, without applying it.

    The results are in methods.json.
    """

    def post_trainer_create(self, cfg, trainer):
        found = {}
        run = Run.of(trainer)
        stack = find_layer_stack(run.model)
        for method in os.environ["LAYERSEL_TEST_METHODS"].split():
            settings = make_selection_config(method, [1, 2]).resolve(trainer.args.seed)
            plan, _ = make_plan(Selection.of(run, stack, settings))
            scores = {choice.layer: choice.score for choice in plan.layers}
            found[method] = {"scores": scores, "selected": plan.selected, "rows": plan.calibration_rows}
        (Path(cfg.output_dir) / "methods.json").write_text(json.dumps(found))
