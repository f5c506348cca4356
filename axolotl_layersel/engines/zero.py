"""DeepSpeed: ZeRO stage 0 to 3.

Relied on beyond documented interfaces (``tests/unit/engines/test_zero.py`` fails when one of them changes):

* accelerate 1.13.0 and deepspeed 0.18.9: the names of the files that a run resumes from. A ZeRO-3 model is
  partitioned when the trainer is created.
* deepspeed 0.18.9: a partitioned parameter has ``ds_id``, ``ds_numel``, ``ds_shape`` and ``ds_process_group``. Its
  ``ds_tensor`` is this rank's flat part; all parts have one size, and the last ones are padded. A parameter that is not
  gathered has no elements; one below ``stage3_param_persistence_threshold`` stays gathered.
* deepspeed 0.18.9: under ZeRO-3 ``safe_get_local_*`` and ``safe_set_local_*`` access the padded part of the fp32 master
  and of the optimizer's state. Under ZeRO-1 and 2 ``_hp_mapping`` is None, or ``get_hp_fragment`` returns this rank's
  part, not a copy, which starts at ``lp_fragment_address.start`` of the flat parameter. ``step`` links the parts of the
  optimizer's state after it has stepped the first group of parameters, so those of other groups, as LoRA+ makes, stay
  unlinked. ``single_partition_of_fp32_groups`` has the weights by which the optimizer stores the state of each group.
* deepspeed 0.18.9: a second ZeRO-3 engine over the same parameters fails unless their ``ds_active_sub_modules`` were
  cleared and the first engine's ``empty_partition_cache`` was called. ``destroy`` leaves ``module_forward_pre_hook``
  and ``module_forward_post_hook`` on the module, and under ZeRO-3 ``_z3_optimizer`` on each parameter, which keep the
  first engine alive. ``auto`` in the configuration is filled in place.
* deepspeed 0.18.9: ZeRO-3 gathers weights ahead of time in the order that modules ran in before. If a step has another
  order, the rest of this step and the next one, in which the order is recorded again, gather them when they are needed.
"""

import contextlib
import copy
import functools
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed
from torch import nn
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_config

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.engines import check_disk
from axolotl_layersel.engines.base import Engine, move, name_random_state
from axolotl_layersel.engines.collectives import get_rank
from axolotl_layersel.engines.edits import Edit
from axolotl_layersel.engines.moments import NAMES, Moment, find_maps, find_moments, unwrap_optimizer

MISSING_STATE = "deepspeed: the engine has no fp32 state of a LoRA weight. Use ZeRO stage 1, 2 or 3."


class DeepSpeedEngine(Engine):
    """ZeRO stage 0, which is DDP by DeepSpeed."""

    title: ClassVar[str] = "DeepSpeed"
    loads_adapter: ClassVar[bool] = False
    # accelerate lets DeepSpeed step within the backward pass.
    keeps_gradients: ClassVar[bool] = False
    resumes_with_others: ClassVar[bool] = False
    state_writers: ClassVar[dict[str, str]] = {"global_step*": "DeepSpeed"}

    def __init__(self, trainer: Trainer, name: str) -> None:
        super().__init__(trainer, "ddp" if name == "zero0" else name)

    @property
    def config(self) -> dict[str, Any]:
        return self.trainer.accelerator.state.deepspeed_plugin.deepspeed_config

    @classmethod
    def list_state_files(cls, checkpoint: Path, rank: int, world: int) -> list[str]:
        latest = checkpoint / "latest"  # contains the name of the folder with DeepSpeed's state
        if not latest.is_file():
            return ["latest", name_random_state(rank, world)]
        folder = glob.escape(Path(latest.read_text(errors="replace").strip()).name or "global_step")
        files = ["latest", *(f"{folder}/{name}" for name in cls.list_engine_files(rank))]
        # A schedule of DeepSpeed's own is part of its state.
        schedule = [] if "scheduler" in read_config() else ["scheduler.pt"]
        return [*files, *schedule, name_random_state(rank, world)]

    @staticmethod
    def list_engine_files(rank: int) -> list[str]:
        """Return patterns of the files that a rank reads in the folder of DeepSpeed's state."""
        return ["mp_rank_00_model_states.pt"]

    def check_storage(self, writes: bool) -> None:
        check_disk(self.config.get("zero_optimization") or {}, writes)

    @contextlib.contextmanager
    def keep_config(self) -> Iterator[None]:
        config = self.trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
        before = copy.deepcopy(config)
        schedule = (config.get("scheduler") or {}).get("params", {})
        for key in {"total_num_steps", "warmup_num_steps"} & schedule.keys():
            schedule[key] = "auto"
        try:
            yield
        finally:
            config.clear()
            config.update(before)

    def check_optimizer(self) -> None:
        raise LayerselError("deepspeed: ZeRO stage 0 is not supported by layersel.l1ra. Use stage 1, 2 or 3, or DDP.")

    def release(self, model: nn.Module) -> None:
        wrapped = self.trainer.model_wrapped
        super().release(model)
        # destroy() leaves these hooks, which keep the engine, its fp32 masters and moments alive.
        for hook in ("module_forward_pre_hook", "module_forward_post_hook"):
            if hasattr(wrapped, hook):
                getattr(wrapped, hook).remove()


def read_config() -> dict[str, Any]:
    """Return the DeepSpeed config: from the training arguments if they exist, otherwise from the environment."""
    launched = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    return deepspeed_config() or (json.loads(Path(launched).read_text()) if launched else {})


class ZeroEngine(DeepSpeedEngine):
    """ZeRO-1 and ZeRO-2: weights are whole on all ranks, fp32 masters and moments are sharded."""

    @staticmethod
    def list_engine_files(rank: int) -> list[str]:
        # Under bf16 the second name has a prefix.
        return ["mp_rank_00_model_states.pt", f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"]

    def check_optimizer(self) -> None:
        kind = str((self.config.get("optimizer") or {}).get("type", "Adam"))
        if kind.lower() not in ("adam", "adamw"):
            raise LayerselError(
                f"deepspeed: its file's optimizer.type {kind} keeps no Adam moments that layersel.l1ra could move rank "
                "with. Remove its `optimizer` section, or use AdamW."
            )

    @torch.no_grad()
    def edit_parameter(self, parameter: torch.Tensor, edit: Edit) -> None:
        self.edit_weight(parameter, edit)
        self.edit_state(parameter, edit, None)

    def list_moments(self, parameter: torch.Tensor) -> list[Moment]:
        optimizer = unwrap_optimizer(self.trainer.optimizer)
        held = self.read_state(parameter, optimizer)
        return [] if held is None else find_moments(held, type(optimizer).__name__)

    def edit_moment(self, parameter: torch.Tensor, moment: Moment, edit: Edit) -> None:
        self.edit_state(parameter, edit, moment.name)

    def read_state(self, parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor] | None:
        """Return this rank's flat part of the optimizer's state of a parameter, or None if it has none.

        Raises:
            LayerselError: if DeepSpeed has no fp32 state of the parameter.
        """
        mapping = get_mapping(parameter)
        if mapping is None:
            return None
        if not mapping.optim_fragment:
            zero: Any = self.trainer.model_wrapped
            held = zero.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            mapping.set_optim_state_fragment(held, optimizer.state[held])
        return {**find_maps(optimizer.state), **mapping.optim_fragment}

    def edit_state(self, parameter: torch.Tensor, edit: Edit, moment: str | None) -> None:
        """Edit this rank's part of a parameter's fp32 master, or of the Adam moment named ``moment``.

        Raises:
            LayerselError: if DeepSpeed has no fp32 state of the parameter.
        """
        mapping = get_mapping(parameter)
        if mapping is not None:
            edit(mapping.get_hp_fragment(moment), mapping.lp_fragment_address.start, parameter.shape)


class PartitionedEngine(ZeroEngine):
    """ZeRO-3: weights are sharded too, and gathered for each layer's forward and backward pass."""

    is_streamed: ClassVar[bool] = True
    runs_in_lockstep: ClassVar[bool] = True
    settling_steps: ClassVar[int] = 2

    @staticmethod
    def list_engine_files(rank: int) -> list[str]:
        return [
            f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
            f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        ]

    @contextlib.contextmanager
    def materialize(self, tensors: list[torch.Tensor]) -> Iterator[None]:
        import deepspeed

        partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
        whole = [tensor for tensor in tensors if not hasattr(tensor, "ds_id")]
        with contextlib.ExitStack() as stack:
            if partitioned:
                stack.enter_context(deepspeed.zero.GatheredParameters(partitioned))
            stack.enter_context(move(whole, self.trainer.args.device))
            yield

    def find_shape(self, parameter: torch.Tensor) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    def holds_whole(self, parameter: torch.Tensor) -> bool:
        return not hasattr(parameter, "ds_id")

    def restore_trained(self, model: nn.Module, values: dict[str, torch.Tensor]) -> None:
        self.release_weights(model)
        super().restore_trained(model, values)

    def release_weights(self, model: nn.Module) -> None:
        """Partition every weight, also those of modules without a gradient, which stay gathered."""
        for parameter in model.parameters():
            if hasattr(parameter, "ds_active_sub_modules"):
                parameter.ds_active_sub_modules.clear()
        engine: Any = self.trainer.model_wrapped
        engine.empty_partition_cache()

    def release(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.grad = None
        self.release_weights(model)
        super().release(model)
        for parameter in parameters:
            if hasattr(parameter, "_z3_optimizer"):
                del parameter._z3_optimizer

    def gather_parameter(self, parameter: torch.Tensor) -> torch.Tensor:
        if not hasattr(parameter, "ds_id"):
            return super().gather_parameter(parameter)
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return super().gather_parameter(parameter)

    def write_parameter(self, parameter: torch.Tensor, value: torch.Tensor | None) -> None:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if value is not None:
                parameter.data.copy_(value)

    def find_shard(self, parameter: Any) -> tuple[torch.Tensor, int] | None:
        if not hasattr(parameter, "ds_id"):
            return super().find_shard(parameter)
        ranks = torch.distributed.get_process_group_ranks(parameter.ds_process_group)
        part = parameter.ds_tensor.detach().flatten()
        offset = ranks.index(get_rank()) * part.numel()
        # Without padding, and from one of several groups that hold replicas.
        return (part[: max(0, parameter.ds_numel - offset)], offset) if 0 in ranks else None

    def edit_held(self, tensor: Any, edit: Edit, part: torch.Tensor | None = None) -> None:
        if hasattr(tensor, "ds_id"):
            edit_partition(tensor, tensor.ds_tensor, edit)
        # Small parameters also stay gathered between steps; the others have no data then.
        if tensor.numel():
            super().edit_held(tensor, edit, part)

    def read_state(self, parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor] | None:
        from deepspeed import utils

        names = {name for state in optimizer.state.values() for name in state if name in NAMES}
        parts = {name: utils.safe_get_local_optimizer_state(parameter, name) for name in names}
        return {**find_maps(optimizer.state), **parts}

    def edit_state(self, parameter: torch.Tensor, edit: Edit, moment: str | None) -> None:
        from deepspeed import utils

        if moment is None:
            part = utils.safe_get_local_fp32_param(parameter)
            store = utils.safe_set_local_fp32_param
        else:
            part = utils.safe_get_local_optimizer_state(parameter, moment)
            store = functools.partial(utils.safe_set_local_optimizer_state, optim_state_key=moment)
        if part is None:
            raise LayerselError(MISSING_STATE)
        edit_partition(parameter, part, edit)
        store(parameter, part)


def get_mapping(parameter: Any) -> Any:
    """Return DeepSpeed's fp32 state of a parameter under ZeRO-1 and 2, or None on ranks without a part of it.

    Raises:
        LayerselError: if DeepSpeed has none on any rank.
    """
    if not hasattr(parameter, "_hp_mapping"):
        raise LayerselError(MISSING_STATE)
    return parameter._hp_mapping


def edit_partition(parameter: Any, part: torch.Tensor, edit: Edit) -> None:
    """Edit this rank's flat ``part`` of a tensor that ZeRO-3 shards as it shards ``parameter``."""
    edit(part, part.numel() * torch.distributed.get_rank(parameter.ds_process_group), parameter.ds_shape)
