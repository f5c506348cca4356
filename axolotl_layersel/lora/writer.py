"""Save the adapter of a run on every engine, and check the files before they replace earlier ones."""

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.engines import collectives
from axolotl_layersel.lora import verification
from axolotl_layersel.lora.config import find_targets
from axolotl_layersel.lora.factors import split
from axolotl_layersel.lora.gates import ATTRIBUTE as GATE
from axolotl_layersel.lora.layouts import join, write_adapter
from axolotl_layersel.lora.modules import count_experts, find_key
from axolotl_layersel.lora.patterns import resolve
from axolotl_layersel.lora.readiness import Readiness
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.weights import adapter_parameters, find_adapter

LOG = logging.getLogger("axolotl.layersel")

# Turns the tensors and the configuration in training into those of a plain adapter.
Fold = Callable[[dict[str, torch.Tensor], LoraConfig], tuple[dict[str, torch.Tensor], LoraConfig]]


class AdapterWriter:
    """Writes a run's adapter as plain PEFT files, and checks them before they replace earlier ones.

    * The gathered weights equal the shards of the processes, bit for bit.
    * The files read back as they were written.
    * By PEFT's rules the configuration names the LoRA modules of the model and no others, with their ranks.
    * The update of each module is that of the module in training.

    None of these checks runs the model, so they are the same on every engine.

    Args:
        run: the run that owns the adapter.
        fold: turns the weights and the configuration in training into a plain adapter; default: they are one.
        readiness: checks that the prepared adapter is still in place.
    """

    def __init__(self, run: Run, fold: Fold | None = None, readiness: Readiness | None = None) -> None:
        self.run = run
        self.fold = fold
        self.readiness = readiness
        self.reported = False  # whether the log says that adapters are checked

    def save(self, folder: str | Path) -> dict[str, torch.Tensor]:
        """Write the adapter to ``folder``, which is created if needed; every process must call this.

        Returns:
            The whole tensors in training, not folded, on process 0; an empty mapping elsewhere.

        Raises:
            LayerselError: on every process, naming file and fault, if a check fails. The file is discarded.
        """
        if self.readiness:
            self.readiness.check()
        parameters = find_adapter(self.run)
        tensors = self.run.engine.gather_parameters(parameters)
        held = verification.fingerprint_parameters(self.run, parameters)
        collectives.decide_on_rank_zero(lambda: self.write(Path(folder), tensors, held))
        return tensors

    def save_alone(self, folder: str | Path, embeddings: bool | Literal["auto"] = "auto") -> None:
        """Write the adapter to ``folder`` from this process only, which holds whole weights.

        ``embeddings``: see ``adapter_parameters``.

        Raises:
            LayerselError: if the weights are sharded, or a check fails.
        """
        engine = self.run.engine
        if engine.is_streamed:
            raise LayerselError(
                f"{folder}: a single process cannot save the adapter under {engine.name}, which shards the weights. "
                "Call `trainer.save_model` on every process."
            )
        fault = self.readiness.find_fault() if self.readiness else None
        if fault:
            raise LayerselError(fault)
        parameters = adapter_parameters(self.run.model, embeddings)
        tensors = {name: engine.gather_parameter(parameter).contiguous() for name, parameter in parameters.items()}
        held = {name: verification.fingerprint(p.detach().flatten()).tolist() for name, p in parameters.items()}
        self.write(Path(folder), tensors, held)

    def write(self, folder: Path, tensors: dict[str, torch.Tensor], held: dict[str, list[int]]) -> None:
        """Write whole tensors and check the files; ``held``: fingerprints of the shards on the processes."""
        verification.check_gathered(folder / SAFETENSORS_WEIGHTS_NAME, tensors, held)
        config = self.run.config
        plain, plain_config = self.fold(tensors, config) if self.fold else (tensors, config)

        def check(stored: dict[str, torch.Tensor], stored_config: LoraConfig) -> None:
            self.check(folder, tensors, stored, stored_config)

        write_adapter(folder, plain, plain_config, check)

    def check(
        self, folder: Path, tensors: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], config: LoraConfig
    ) -> None:
        """Raise LayerselError unless PEFT would rebuild the model's LoRA from the files that were read back.

        Args:
            folder: where the files will be.
            tensors: the whole weights in training, not folded.
            stored: the tensors in the file.
            config: the configuration in the file.
        """
        path, modules, adapter = folder / SAFETENSORS_WEIGHTS_NAME, self.run.lora_modules, self.run.adapter
        fail_config = functools.partial(verification.fail, folder / CONFIG_NAME, advice=verification.REPORT)
        fail_weights = functools.partial(verification.fail, path, advice=verification.REPORT)
        # The configuration names the modules that carry the adapter, and no others.
        for name in sorted({*find_targets(config, self.run.base, adapter)} ^ modules.keys()):
            makes = "no LoRA on" if name in modules else "LoRA on"
            fail_config(f"PEFT would put {makes} {name}")
        for name in sorted(tensors.keys() ^ stored.keys()):
            fail_weights(f"{name} {'is missing' if name in tensors else 'does not belong to this model'}")
        for name, tensor in tensors.items():
            if stored[name].dtype != tensor.dtype:
                fail_weights(f"{name} has dtype {stored[name].dtype}, and {tensor.dtype} in training")
        (live, _), (written, _) = split(tensors), split(stored)
        matrices = {name: pair for name, pair in live.items() if pair.down.dim() == pair.up.dim() == 2}
        # Folding changes only A and B of linear modules and of experts.
        for name in tensors.keys() - join(matrices).keys():
            if not torch.equal(stored[name], tensors[name]):
                fail_weights(f"{name} has other values than in training")
        # PEFT's own rule gives each module the rank of its matrices, and the scaling under which it adds the same.
        keys = {name: find_key(name, module) for name, module in modules.items()}
        resolved = resolve(config, keys.values())
        for name, module in modules.items():
            rank, scaling = resolved[keys[name]]
            pair = matrices.get(name)
            held = module.r[adapter] if pair is None else written[name].rank // count_experts(module)
            if rank != held:
                fail_config(f"PEFT would give LoRA on {name} rank {rank}, but its matrices have rank {held}")
            if module.use_dora.get(adapter, False) != config.use_dora:
                fail_config(f"use_dora: {config.use_dora} contradicts {name} in training")
            if pair is not None:
                gates = getattr(module.lora_A[adapter], GATE, None)
                gates = None if gates is None else gates.detach().cpu()
                verification.check_update(path, name, pair, module.scaling[adapter], gates, written[name], scaling)
            # Folding puts the scaling into B; B of zero would show no wrong one.
            if (pair is None or self.fold is None) and not math.isclose(scaling, module.scaling[adapter]):
                fail_config(
                    f"PEFT would scale LoRA on {name} by {scaling}, training scales it by {module.scaling[adapter]}"
                )
        if not self.reported:
            LOG.info(
                "layersel: the adapter in %s was read back, and its modules compute what the model's compute", folder
            )
            self.reported = True
