"""The one place that knows DDP, DeepSpeed ZeRO and FSDP2, and the private parts of the libraries under them.

What is relied on beyond documented interfaces, with the version it was seen in (``tests/test_engines.py``
fails loudly when one of them changes):

* transformers 5.16.1, ``Trainer.save_model``: is called for every checkpoint, before any push to a hub.
* transformers 5.16.1, ``PreTrainedModel.enable_input_require_grads``: registers forward hooks named
  ``make_inputs_require_grads`` on the embeddings, more than once under gradient checkpointing.
* transformers 5.16.1 and accelerate 1.13.0: at the trainer's creation a ZeRO-3 model is partitioned and an
  FSDP2 model lies whole on the CPU, or with ``cpu_ram_efficient_loading`` on rank 0 alone.
* accelerate 1.13.0: restoring FSDP2 weights from FULL_STATE_DICT leaves the shards of ranks above 0 as they
  were initialised.
* transformers 5.16.1, ``Trainer._load_from_checkpoint`` and ``_load_best_model``: on one process and DDP both
  restore LoRA weights through the model's own ``load_adapter``, and by nothing else.
* transformers 5.16.1, ``Trainer._save``: the adapter's files come from the model's own ``save_pretrained``. axolotl
  0.19.0: so do those after training on one process, DDP and ZeRO-1/2; ZeRO-3 has ``save_model`` write them, FSDP2 the
  function ``save_fsdp2_lora_adapter``, which also writes checkpoints where the base is quantised. Both callers look it
  up in its module when they save.
* transformers 5.16.1, accelerate 1.13.0, deepspeed 0.18.9 and axolotl 0.19.0: the names of the files that they
  resume from, see ``list_state_files``; ``trainer_state.json`` is written last. Before a trainer exists the engine is
  told by the variables that accelerate reads, which axolotl sets.
* transformers 5.16.1, ``Trainer._inner_training_loop``: looks at ``should_training_stop`` after every
  ``_run_epoch`` only, which makes a step at least; nothing saves or evaluates before the first one but
  ``eval_on_start``.
* transformers 5.16.1, ``Trainer._save_checkpoint``: leaves ``state()`` of every ``ExportableState`` callback in
  ``stateful_callbacks``, of several of a class in a list that grows with every checkpoint;
  ``_load_callback_state`` restores them only on request, by making the callbacks anew at the end of the list.
* transformers 5.16.1, ``Trainer.set_initial_training_values``: ends in the planned number of optimizer steps.
* accelerate 1.13.0, ``Accelerator.prepare``: what iterates over batches is the ``base_dataloader`` of what it returns,
  whose ``worker_init_fn`` is read when an iteration begins.
* transformers 5.16.1, ``Trainer._save_checkpoint``: writes a whole checkpoint of the last step; what the step had
  still to do lies in ``trainer_state.json`` as the state of ``TrainerControl``, in which ``should_evaluate`` is true
  until the evaluation is over. ``_evaluate``, ``_determine_best_metric`` and ``_load_rng_state`` make up for one.
* deepspeed 0.18.9: a partitioned parameter has ``ds_id``, ``ds_numel``, ``ds_shape`` and ``ds_process_group``, and this
  rank's part of what the next forward gathers in ``ds_tensor``: flat, all ranks' parts of one size, the last ones
  padded; its ``status`` says whether it is in memory. A parameter that is not gathered has no elements; one under
  ``stage3_param_persistence_threshold`` stays gathered.
* deepspeed 0.18.9: ``safe_get_local_*`` and ``safe_set_local_*`` pass the padded part of the fp32 master and of the
  optimizer's state under ZeRO-3. Under ZeRO-1 and 2 ``_hp_mapping`` is None or holds this rank's part: of the flat
  parameter from ``lp_fragment_address.start`` on what ``get_hp_fragment`` returns, itself and not a copy.
* transformers 5.16.1, ``Trainer.train`` can be called again on a trainer whose attributes were put back;
  accelerate 1.13.0 keeps a model in mixed precision in its ``forward`` and ``_original_forward``; axolotl 0.19.0
  and trl 1.9.0 collect what they will log in ``_stored_metrics`` and ``_metrics``. Of axolotl's arguments those in
  ``STEP_COUNTS`` count optimizer steps of its schedule.
* transformers 5.16.1, ``Trainer._prepare_inputs``: puts a micro-batch on the device. axolotl 0.19.0,
  ``activation_offload_context``: where it exists, forward passes that train run inside.
* deepspeed 0.18.9: a second ZeRO-3 engine over the same parameters fails unless each one's
  ``ds_active_sub_modules`` was cleared and the first engine's ``empty_partition_cache`` called; ``destroy`` leaves
  ``module_forward_pre_hook`` and ``module_forward_post_hook`` on the module and, of ZeRO-3, ``_z3_optimizer`` on
  each parameter, by which the first engine lives on; it fills ``auto`` in the configuration that it is given in place.
* accelerate 1.13.0, ``_prepare_fsdp2``: knows the parameters of a sharded model that is prepared again by the
  ``data_ptr()`` of their local shards, which is 0 for every empty one.
* torch 2.13.0: the process group's store is ``distributed_c10d._get_default_store()``, and its ``wait`` raises
  ``DistStoreError`` when the time is over.
* torch 2.13.0: an FSDP2 parameter is a ``DTensor``, and so are its optimizer's moments; after a forward pass without
  a backward pass it may be a whole plain parameter in the precision of the forward pass. Where a DTensor's part lies
  in the whole says ``compute_local_shape_and_global_offset``.
* torch 2.13.0: Adam's and AdamW's moments are ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq``; deepspeed's
  Adam has the first two.
"""

import contextlib
import copy
import functools
import glob
import json
import math
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from axolotl_layersel.errors import LayerselError

T = TypeVar("T")

FORWARD_ATTRIBUTES = {"forward", "_original_forward"}
METRIC_ATTRIBUTES = {"_stored_metrics", "_metrics"}
STEP_COUNTS = ("jagged_restart_steps", "jagged_restart_warmup_steps", "jagged_restart_anneal_steps")


def name_engine(trainer: Trainer) -> str:
    """Return ``single``, ``ddp``, ``zero1``, ``zero2``, ``zero3`` or ``fsdp2``.

    Raises:
        LayerselError: for an engine that is not supported.
    """
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type.value
    if kind == "NO":
        return "single"
    if kind == "DEEPSPEED":
        stage = int(accelerator.state.deepspeed_plugin.zero_stage)
        return f"zero{stage}" if stage else "ddp"
    if kind == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version == 2:
        return "fsdp2"
    if kind.startswith("MULTI_"):
        return "ddp"
    raise LayerselError(
        f"layersel: the engine {kind} is not supported. Use one process, DDP, DeepSpeed ZeRO-1, 2 or 3, or FSDP2."
    )


def is_distributed() -> bool:
    """Return whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def get_rank() -> int:
    """Return this process's rank among all processes of all nodes."""
    return torch.distributed.get_rank() if is_distributed() else 0


def count_ranks() -> int:
    """Return the number of processes of all nodes."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def decide_on_rank_zero(decide: Callable[[], T]) -> T:
    """Return ``decide()`` as rank 0 computed it, on every rank; files that it reads need lie on rank 0's disk only.

    Raises:
        LayerselError: on every rank, if rank 0 raised it. Another exception of rank 0 is raised there, and
            named in a LayerselError elsewhere, so that no rank waits for one that is gone.
    """
    if not is_distributed():
        return decide()
    outcome: list[object] = [None, None]
    failure: Exception | None = None
    if get_rank() == 0:
        try:
            outcome[0] = decide()
        except Exception as error:
            failure = error
            outcome[1] = str(error) if isinstance(error, LayerselError) else f"rank 0 failed: {error!r}"
    torch.distributed.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise LayerselError(outcome[1])
    return outcome[0]  # type: ignore[return-value]


def gather_on_rank_zero(values: dict[int, torch.Tensor], ranks: list[int]) -> torch.Tensor | None:
    """Return the values that ``ranks`` hold, stacked in the order of their index, on rank 0; None elsewhere."""
    if is_distributed() and ranks != [0]:
        world = torch.distributed.get_world_size()
        parts: list[dict[int, torch.Tensor]] | None = [{} for _ in range(world)] if get_rank() == 0 else None
        torch.distributed.gather_object(values, parts, dst=0)
        values = {index: value for part in parts or [] for index, value in part.items()}
    return torch.stack([values[index] for index in sorted(values)]) if get_rank() == 0 else None


def wait_for_everyone() -> None:
    """Return when all ranks have come here."""
    if is_distributed():
        torch.distributed.barrier()


# --- What a run resumes from --------------------------------------------------------------------------------------

# Read where they are there: of fp16's loss scaler, and Axolotl's count of tokens.
OPTIONAL_STATE_FILES = ("scaler.pt", "tokens_state.json")
FSDP_FOLDERS = ("pytorch_model_fsdp_0", "optimizer_0")
WRITERS = {
    "optimizer.pt": "one process or DDP",
    "global_step*": "DeepSpeed",
    "optimizer.bin": "FSDP2 with FULL_STATE_DICT",
    "optimizer_0": "FSDP2 with SHARDED_STATE_DICT",
}


def list_state_files(checkpoint: Path, rank: int, world: int) -> list[str]:
    """Return what the engine of this process reads to resume, as patterns in the folder of a checkpoint.

    It is told by the variables of the process, for it is asked before the model loads.

    Args:
        checkpoint: its folder; DeepSpeed names in it where its state lies.
        rank: whose files are asked for: those that all ranks read, and its own.
        world: the number of processes.
    """
    random = "rng_state.pth" if world == 1 else f"rng_state_{rank}.pth"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return [*list_deepspeed_files(checkpoint, rank), random]
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return ["optimizer.pt", "scheduler.pt", random]
    if os.environ.get("FSDP_STATE_DICT_TYPE", "").upper() == "FULL_STATE_DICT":
        return [*(["pytorch_model_fsdp.bin", "optimizer.bin"] if rank == 0 else []), "scheduler.pt", random]
    shards = [f"{folder}/{name}" for folder in FSDP_FOLDERS for name in (".metadata", f"__{rank}_*.distcp")]
    return [*shards, "scheduler.pt", random]


def list_deepspeed_files(checkpoint: Path, rank: int) -> list[str]:
    """Return what DeepSpeed's engine reads, see ``list_state_files``."""
    latest = checkpoint / "latest"
    if not latest.is_file():
        return ["latest"]
    folder = glob.escape(Path(latest.read_text(errors="replace").strip()).name or "global_step")
    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 0))
    weights = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    files = ["latest", f"{folder}/{weights}"]
    if stage:
        files.append(f"{folder}/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")  # under bf16 its name begins so
    config = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    # DeepSpeed's own schedule is in its state.
    scheduled = config is not None and "scheduler" in json.loads(Path(config).read_text())
    return files if scheduled else [*files, "scheduler.pt"]


def name_writer(checkpoint: Path) -> str | None:
    """Return the engine whose optimizer's state is in ``checkpoint``, or None where there is none."""
    return next((engine for pattern, engine in WRITERS.items() if any(checkpoint.glob(pattern))), None)


def respect_stop_before_first_step(trainer: Trainer) -> None:
    """Let a callback's ``should_training_stop`` count at ``on_train_begin`` too, before any step is made."""
    upstream = trainer._run_epoch

    def run_epoch(*args, **kwargs) -> None:
        if not trainer.control.should_training_stop:
            upstream(*args, **kwargs)

    trainer._run_epoch = run_epoch


def restore_callbacks(callbacks: list[TrainerCallback], state: TrainerState) -> None:
    """Give callbacks back what they had counted when the checkpoint that ``state`` is from was written.

    They stay the objects that they are, in their order and with the settings of this run.
    """
    for kind in {type(callback) for callback in callbacks if isinstance(callback, ExportableState)}:
        same = [callback for callback in callbacks if type(callback) is kind]
        # The next checkpoint could not be written without an entry for one that this run is the first to have.
        saved = state.stateful_callbacks.setdefault(kind.__name__, [callback.state() for callback in same])
        saved = saved if isinstance(saved, list) else [saved]
        for callback, values in zip(same, saved[-len(same) :]):
            for name, value in values["attributes"].items():
                setattr(callback, name, value)


# --- A pass of the model before any engine exists -----------------------------------------------------------------


def ranks_with_weights(trainer: Trainer) -> list[int]:
    """Return the ranks that can run the model: all, but rank 0 alone under FSDP's ``cpu_ram_efficient_loading``."""
    if name_engine(trainer) == "fsdp2" and trainer.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        return [0]
    return list(range(torch.distributed.get_world_size() if is_distributed() else 1))


def runs_in_lockstep(trainer: Trainer) -> bool:
    """Return whether a forward pass communicates, so that all ranks must run the same number of them."""
    return name_engine(trainer) == "zero3"


def is_streamed(trainer: Trainer) -> bool:
    """Return whether layers come to the device one at a time: ZeRO-3 and FSDP2, whose model need not fit on it."""
    return name_engine(trainer) in ("zero3", "fsdp2")


@contextlib.contextmanager
def materialize(trainer: Trainer, tensors: list[torch.Tensor]) -> Iterator[None]:
    """Make parameters and buffers whole and put them on the trainer's device, then as they were.

    ZeRO-3 gathers its partitions and lets them go again; what lies whole on the CPU (FSDP2 before sharding,
    LoRA weights) is copied to the device, and the copy dropped.
    """
    partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    whole = [tensor for tensor in tensors if not hasattr(tensor, "ds_id")]
    with contextlib.ExitStack() as stack:
        if partitioned:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        stack.enter_context(move(whole, trainer.args.device))
        yield


@contextlib.contextmanager
def move(tensors: list[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Let ``tensors`` hold copies on ``device``, then their own data again."""
    origins = [(tensor, tensor.data) for tensor in tensors if tensor.device != device]
    for tensor, data in origins:
        move_tensor(tensor, data.to(device))
    try:
        yield
    finally:
        for tensor, data in origins:
            move_tensor(tensor, data)


def move_tensor(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Give ``tensor`` the data of another device; a 4-bit weight's quantisation state follows it."""
    tensor.data = data
    if getattr(tensor, "quant_state", None) is not None:
        tensor.quant_state.to(data.device)


# --- A trial of training, and back --------------------------------------------------------------------------------


def copy_trained(trainer: Trainer, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what ``restore_trained`` needs of the parameters that train, by name, before any engine exists.

    Where weights will lie in shards, rank 0 alone holds the copies.
    """
    if is_streamed(trainer):
        return gather_parameters({name: p for name, p in model.named_parameters() if p.requires_grad})
    return {name: p.detach().clone().cpu() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore_trained(trainer: Trainer, model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Write ``values`` into the parameters of a live engine, but not into its optimizer; every rank must call this."""
    reshard(trainer)
    engine = name_engine(trainer)
    parameters = dict(model.named_parameters())
    for name in decide_on_rank_zero(lambda: list(values)):
        parameter = parameters[name]
        if engine == "fsdp2":
            set_fsdp_parameter(parameter, values.get(name))
        elif engine == "zero3":
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if get_rank() == 0:
                    parameter.data.copy_(values[name])
        else:
            parameter.data.copy_(values[name])


def release(trainer: Trainer, model: nn.Module) -> None:
    """Let go of an engine that has trained, so that another one can be built; every rank must call this."""
    engine, wrapped = name_engine(trainer), trainer.model_wrapped
    for parameter in model.parameters():
        parameter.grad = None
        if hasattr(parameter, "ds_active_sub_modules"):
            parameter.ds_active_sub_modules.clear()
    if engine == "zero3":
        wrapped.empty_partition_cache()
    trainer.accelerator.free_memory()
    # DeepSpeed's destroy() leaves what holds the engine, and with it the fp32 masters and the moments.
    for hook in ("module_forward_pre_hook", "module_forward_post_hook"):
        if hasattr(wrapped, hook):
            getattr(wrapped, hook).remove()
    for parameter in model.parameters():
        if hasattr(parameter, "_z3_optimizer"):
            del parameter._z3_optimizer
    if engine == "fsdp2":
        for parameter in model.parameters():
            shard = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if parameter.requires_grad and shard.numel() == 0:
                parameter._local_tensor.data_ptr = functools.partial(id, parameter)


@contextlib.contextmanager
def keep_deepspeed_config(trainer: Trainer) -> Iterator[None]:
    """Give DeepSpeed's configuration back as it was; within the block its schedule follows the run's steps."""
    if not trainer.is_deepspeed_enabled:
        yield
        return
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    before = copy.deepcopy(config)
    schedule = (config.get("scheduler") or {}).get("params", {})
    for key in {"total_num_steps", "warmup_num_steps"} & schedule.keys():
        schedule[key] = "auto"
    try:
        yield
    finally:
        config.clear()
        config.update(before)


def prepare_inputs(trainer: Trainer, inputs: dict) -> dict:
    """Return a micro-batch on the trainer's device, as its own steps prepare it."""
    return trainer._prepare_inputs(inputs)


def initialize_loaders(trainer: Trainer, initialize: Callable[[int], None]) -> None:
    """Let ``initialize`` run first in every process that loads data for ``trainer``, with that process's number."""

    def initializing(upstream: Callable) -> Callable:
        def get_dataloader(*args, **kwargs) -> Any:
            prepared = upstream(*args, **kwargs)
            loader = getattr(prepared, "base_dataloader", prepared)
            own = getattr(loader, "worker_init_fn", None)
            # A loader whose processes stay is returned again.
            if getattr(own, "func", None) is not initialize_both:
                loader.worker_init_fn = functools.partial(initialize_both, initialize, own)
            return prepared

        return get_dataloader

    for name in ("get_train_dataloader", "get_eval_dataloader"):
        setattr(trainer, name, initializing(getattr(trainer, name)))


def initialize_both(first: Callable[[int], None], then: Callable[[int], None] | None, worker: int) -> None:
    """Initialise a process that loads data in two ways."""
    first(worker)
    if then is not None:
        then(worker)


def offload_activations(trainer: Trainer) -> contextlib.AbstractContextManager:
    """Return the context in which the trainer's own forward passes keep their activations elsewhere, if it has one."""
    return getattr(trainer, "activation_offload_context", contextlib.nullcontext())


# --- Weights of a live engine -------------------------------------------------------------------------------------


def gather_parameter(parameter: nn.Parameter) -> torch.Tensor:
    """Return the whole of ``parameter`` on the CPU, detached; a collective call on ZeRO-3 and FSDP2."""
    if hasattr(parameter, "full_tensor"):
        return gather_shards(parameter).cpu()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone().cpu()
    return parameter.detach().clone().cpu()


def gather_parameters(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return the whole parameters by name on rank 0, an empty mapping elsewhere; a collective call."""
    gathered = {}
    for name, parameter in parameters.items():
        tensor = gather_parameter(parameter)
        if get_rank() == 0:
            gathered[name] = tensor.contiguous()
    return gathered


def gather_shards(shards: torch.Tensor) -> torch.Tensor:
    """Return the whole of a DTensor on its mesh's device; a collective call. Offloaded shards are copied there."""
    from torch.distributed.tensor import DTensor

    mesh = shards.device_mesh
    local = shards.detach().to_local().to(mesh.device_type)
    return DTensor.from_local(local, mesh, shards.placements, shape=shards.shape, stride=shards.stride()).full_tensor()


def set_fsdp_parameter(parameter: torch.Tensor, value: torch.Tensor | None) -> None:
    """Write rank 0's ``value`` (whole) into the shards of an FSDP2 ``parameter`` on all ranks; a collective call.

    What other ranks pass does not count, and may be None.
    """
    from torch.distributed.tensor import distribute_tensor

    value = torch.empty(parameter.shape, dtype=parameter.dtype) if value is None else value
    whole = value.to(device=parameter.device_mesh.device_type, dtype=parameter.dtype)
    shards = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    with torch.no_grad():
        parameter.to_local().copy_(shards.to_local())


def find_shard(parameter: nn.Parameter) -> tuple[torch.Tensor, int] | None:
    """Return this rank's part of a parameter, flat, and the place of its first element in the whole.

    All ranks' parts together are the whole, once: a rank whose part is a copy of another's gets None. Every rank must
    call this, where FSDP2 holds shards, see ``reshard``.
    """
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = parameter.device_mesh, parameter.placements
        coordinate = mesh.get_coordinate()
        if any(place and not placement.is_shard() for place, placement in zip(coordinate, placements)):
            return None
        shape, offsets = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
        if tuple(shape[1:]) != tuple(parameter.shape[1:]):
            raise LayerselError(f"fsdp_config: shards of {placements} are not supported. Shard the first dimension.")
        return parameter.detach().to_local().flatten(), offsets[0] * math.prod(shape[1:])
    if hasattr(parameter, "ds_id"):
        if parameter.ds_tensor.status.name != "AVAILABLE":  # it lies on an NVMe disk
            whole = gather_parameter(parameter)
            return (whole.flatten(), 0) if get_rank() == 0 else None
        ranks = torch.distributed.get_process_group_ranks(parameter.ds_process_group)
        part = parameter.ds_tensor.detach().flatten()
        offset = ranks.index(get_rank()) * part.numel()
        # The last partition is padded.
        return (part[: max(0, parameter.ds_numel - offset)], offset) if 0 in ranks else None
    return (parameter.detach().flatten(), 0) if get_rank() == 0 else None


# Changes a whole tensor in place: each element by its place and its own value alone, for others' are not known
# everywhere, and the same way on every rank.
Edit = Callable[[torch.Tensor], None]
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@torch.no_grad()
def edit_parameter(trainer: Trainer, parameter: nn.Parameter, edit: Edit) -> None:
    """Change a trained parameter of a live engine between two optimizer steps, on every rank.

    What the next forward reads and, where there is one, the fp32 master both change; what ``edit`` leaves as it
    is stays so bit for bit. Nothing is communicated: every rank changes the part that it holds.

    Args:
        trainer: whose engine it is.
        parameter: one that the engine trains.
        edit: see ``Edit``.
    """
    engine = name_engine(trainer)
    if engine == "fsdp2":
        edit_shards(parameter, edit)
        return
    edit_weight(parameter, edit)
    if engine.startswith("zero"):
        edit_zero_state(parameter, edit, None)


@torch.no_grad()
def edit_weight(parameter: nn.Parameter, edit: Edit) -> None:
    """Change a parameter, whole or split by ZeRO-3, but not the fp32 master that an engine may have of it."""
    if hasattr(parameter, "ds_id"):
        edit_partition(parameter, parameter.ds_tensor, edit)
    # ZeRO-3 keeps small parameters whole between steps, and has no data of the others then.
    if parameter.numel():
        edit(parameter.data)


@torch.no_grad()
def edit_moments(trainer: Trainer, parameter: nn.Parameter, edit: Edit) -> None:
    """Change both Adam moments of a parameter as ``edit_parameter`` does.

    Raises:
        LayerselError: if the optimizer has none.
    """
    engine = name_engine(trainer)
    if engine.startswith("zero"):
        for moment in MOMENTS[:2]:
            edit_zero_state(parameter, edit, moment)
        return
    state = trainer.optimizer.state.get(parameter, {})
    if not state and any(trainer.optimizer.state.values()):
        return  # no gradient has reached it yet: its moments are zero
    check_moments(state, type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__)
    for moment in MOMENTS:
        if moment in state:
            change = edit_shards if engine == "fsdp2" else lambda tensor, edit: edit(tensor)
            change(state[moment], edit)


def check_moments(state: dict, optimizer: str) -> None:
    """Raise LayerselError unless ``state`` holds Adam's two moments as plain numbers."""
    missing = [moment for moment in MOMENTS[:2] if not torch.is_tensor(state.get(moment))]
    if missing or not all(state[moment].is_floating_point() for moment in MOMENTS[:2]):
        raise LayerselError(
            f"optimizer: {optimizer} keeps no {(missing or MOMENTS)[0]} that rank could move with. "
            "Use `optimizer: adamw_torch` or `adamw_torch_fused`."
        )


def check_deepspeed_optimizer(trainer: Trainer) -> None:
    """Raise LayerselError for a DeepSpeed file under whose settings rank cannot move."""
    if name_engine(trainer) == "ddp":
        raise LayerselError("deepspeed: ZeRO stage 0 is not supported by layersel.l1ra. Use stage 1, 2 or 3, or DDP.")
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    section = config.get("optimizer") or {}
    kind = str(section.get("type", "Adam"))
    if kind.lower() not in ("adam", "adamw"):
        raise LayerselError(
            f"deepspeed: its file's optimizer.type {kind} keeps no Adam moments that layersel.l1ra could move rank "
            "with. Remove its `optimizer` section, or use AdamW."
        )
    offload = config["zero_optimization"].get("offload_param") or {}
    if offload.get("device") == "nvme":
        raise LayerselError(
            "deepspeed: its file's zero_optimization.offload_param.device nvme keeps weights on disk, where "
            "layersel.l1ra does not write. Use `cpu` or `none`."
        )


def count_optimizer_steps(trainer: Trainer) -> int:
    """Return the planned number of optimizer steps of a run that has not begun."""
    if trainer.args.max_steps > 0:  # Axolotl always says it
        return trainer.args.max_steps
    with torch.random.fork_rng():
        return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def reshard(trainer: Trainer) -> None:
    """Let FSDP2 go of whole weights that a forward without a backward has left behind; nothing elsewhere."""
    if name_engine(trainer) == "fsdp2":
        from torch.distributed.fsdp import FSDPModule

        for module in trainer.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def edit_shards(shards: torch.Tensor, edit: Edit) -> None:
    """Change this rank's part of a DTensor."""
    from torch.distributed.tensor import distribute_tensor

    mesh, local = shards.device_mesh, shards.to_local()
    places = torch.arange(shards.numel(), device=mesh.device_type).view(shards.shape)
    # Without a source every rank cuts its part out of its own tensor.
    places = distribute_tensor(places, mesh, shards.placements, src_data_rank=None).to_local().to(local.device)
    whole = local.new_zeros(shards.shape)
    whole.view(-1)[places] = local
    edit(whole)
    local.copy_(whole.view(-1)[places])


def edit_partition(parameter: nn.Parameter, part: torch.Tensor, edit: Edit) -> None:
    """Change this rank's flat ``part`` of a tensor that has the shape of ``parameter`` and is split by ZeRO-3."""
    start = part.numel() * torch.distributed.get_rank(parameter.ds_process_group)
    edit_slice(part, start, parameter.ds_shape, edit)


def edit_slice(part: torch.Tensor, start: int, shape: torch.Size, edit: Edit) -> None:
    """Change ``part``, the elements from ``start`` on of a flattened tensor of ``shape``; past its end is padding."""
    whole = part.new_zeros(shape)
    held = whole.view(-1)[start : start + part.numel()]
    held.copy_(part[: held.numel()])
    edit(whole)
    part[: held.numel()].copy_(held)


def edit_zero_state(parameter: nn.Parameter, edit: Edit, moment: str | None) -> None:
    """Change this rank's part of the fp32 master of a parameter under ZeRO, or of one of its Adam moments.

    Raises:
        LayerselError: if there is none.
    """
    from deepspeed import utils

    if hasattr(parameter, "ds_id"):
        if moment is None:
            part = utils.safe_get_local_fp32_param(parameter)
            store = utils.safe_set_local_fp32_param
        else:
            part = utils.safe_get_local_optimizer_state(parameter, moment)
            store = functools.partial(utils.safe_set_local_optimizer_state, optim_state_key=moment)
        if part is not None:
            edit_partition(parameter, part, edit)
            store(parameter, part)
            return
    elif hasattr(parameter, "_hp_mapping"):
        mapping = parameter._hp_mapping  # None on ranks that hold no part of it
        if mapping is not None:
            edit_slice(mapping.get_hp_fragment(moment), mapping.lp_fragment_address.start, parameter.shape, edit)
        return
    raise LayerselError("deepspeed: the engine keeps no fp32 state of a LoRA weight. Use ZeRO stage 1, 2 or 3.")


def broadcast(tensor: torch.Tensor) -> None:
    """Give every rank rank 0's ``tensor``, in place; a collective call."""
    if is_distributed():
        torch.distributed.broadcast(tensor, src=0)


def add_up(tensor: torch.Tensor) -> None:
    """Add ``tensor`` up over all ranks in place; a collective call."""
    if is_distributed():
        torch.distributed.all_reduce(tensor)


def average(tensor: torch.Tensor) -> None:
    """Average ``tensor`` over all ranks in place; a collective call."""
    if is_distributed():
        add_up(tensor)
        tensor.div_(torch.distributed.get_world_size())


def average_differentiably(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the averages over all ranks, through which gradients flow; a collective call, and one when they do."""
    if not is_distributed():
        return tensors
    from torch.distributed.nn.functional import all_reduce

    flat = torch.cat([tensor.flatten() for tensor in tensors])
    flat = all_reduce(flat) / torch.distributed.get_world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]


def gather_from_all(value: T) -> list[T]:
    """Return what every rank passed, by rank; a collective call."""
    if not is_distributed():
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def find_differing_ranks(digest: bytes | None) -> list[int]:
    """Return the ranks whose ``digest`` is not that of rank 0, ascending; None has no say. A collective call."""
    digests = gather_from_all(digest)
    return [rank for rank, other in enumerate(digests) if other not in (None, digests[0])]


def find_absent_ranks(place: str, seconds: float) -> list[int]:
    """Return the ranks that have not called this with ``place`` within ``seconds``, ascending.

    No collective call, in which a rank would wait, or worse be answered by one of somebody else's.
    """
    if not is_distributed():
        return []
    store = torch.distributed.distributed_c10d._get_default_store()
    keys = [f"layersel/{place}/{rank}" for rank in range(torch.distributed.get_world_size())]
    store.set(keys[get_rank()], "here")
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except torch.distributed.DistStoreError:
        return [rank for rank, key in enumerate(keys) if not store.check([key])]
    return []


def remove_embedding_hooks(model: nn.Module) -> None:
    """Remove every hook by which transformers makes the embeddings' output require a gradient."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
                del module._forward_hooks[key]


def begin_to_share(number: int, device: torch.device) -> Callable[[], int]:
    """Begin to find the largest ``number`` of all ranks, a collective call, and return what returns it.

    No rank waits for another until it asks for the result. That waits for the device too.
    """
    if not is_distributed():
        return lambda: number
    value = torch.tensor([number], device=device)
    work = torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, async_op=True)

    def finish() -> int:
        work.wait()
        return int(value.item())

    return finish


def share_largest(number: int, device: torch.device) -> int:
    """Return the largest ``number`` of all ranks; a collective call, in which each waits for all."""
    return begin_to_share(number, device)()


def save_checkpoint(trainer: Trainer) -> None:
    """Write a whole checkpoint of the step that has ended, between two forward passes; every rank must call this."""
    reshard(trainer)
    trainer._save_checkpoint(trainer.model, None)


def is_evaluation_due(trainer: Trainer) -> bool:
    """Return whether the checkpoint that the run was resumed from was written before its step's evaluation."""
    control = trainer.state.stateful_callbacks.get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_evaluate"))


def evaluate_and_save(trainer: Trainer, checkpoint: str) -> None:
    """Make up for the evaluation that ``checkpoint`` lacks, and write it again; every rank must call this.

    Called when training begins again from it.
    """
    control = trainer.control
    control.should_evaluate = True
    trainer._determine_best_metric(trainer._evaluate(None, None), None)
    # Random streams are loaded when the first batch is; the checkpoint gets those that it had.
    trainer._load_rng_state(checkpoint)
    save_checkpoint(trainer)
    trainer.callback_handler.on_save(trainer.args, trainer.state, control)


def leave(code: int) -> None:
    """End this process with ``code`` once all ranks are here, so that none is cut off in a collective call."""
    wait_for_everyone()
    if is_distributed():
        torch.distributed.destroy_process_group()
    raise SystemExit(code)
