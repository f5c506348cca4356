"""The one writer of a run's adapter, on every engine. It checks what it wrote before it keeps it."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.engines import collectives
from axolotl_layersel.lora import adapters, verification
from axolotl_layersel.lora.eval_mode import precision
from axolotl_layersel.lora.factors import split
from axolotl_layersel.lora.gates import ATTRIBUTE as GATE
from axolotl_layersel.lora.layouts import write_adapter
from axolotl_layersel.lora.modules import find_key
from axolotl_layersel.lora.patterns import find_scalings
from axolotl_layersel.lora.readiness import Readiness
from axolotl_layersel.lora.run import Run

LOG = logging.getLogger("axolotl.layersel")


class AdapterWriter:
    """Writes the adapter of a run as plain PEFT files, and checks each before it takes its place.

    The gathered weights must be those of the ranks, bit for bit. The file must read back as it was written, name the
    modules that carry LoRA and no other, and add to each module's output what the module in training adds. The first
    time, the model also runs on a few tokens with the written adapter in place of its own, and must give the same
    logits. That is left out on ZeRO-3 and FSDP2, whose modules hold shards of another shape.

    Args:
        run: whose model carries the adapter.
        fold: what makes a plain adapter of the tensors and the configuration in training.
        readiness: what knows whether the adapter is the one that was prepared.
    """

    def __init__(self, run: Run, fold: adapters.Fold | None = None, readiness: Readiness | None = None) -> None:
        self.run = run
        self.fold = fold
        self.readiness = readiness
        self.computed = False  # whether logits have been compared

    def save(self, folder: str | Path) -> dict[str, torch.Tensor]:
        """Write the adapter to ``folder``, which is made where it does not exist; every rank must call this.

        Returns:
            The tensors in training, whole and not folded, on rank 0; nothing elsewhere.

        Raises:
            LayerselError: on every rank, naming file and fault, if what was written is not right; it is not kept.
        """
        if self.readiness:
            self.readiness.check()
        parameters = adapters.find_adapter(self.run)
        tensors = self.run.engine.gather_parameters(parameters)
        held = verification.fingerprint_parameters(self.run, parameters)
        collectives.decide_on_rank_zero(lambda: self.write(Path(folder), tensors, held))
        return tensors

    def save_alone(self, folder: str | Path, embeddings: bool | Literal["auto"] = "auto") -> None:
        """Write the adapter to ``folder`` from this process alone, whose weights are whole.

        ``embeddings``: see ``adapters.adapter_parameters``.

        Raises:
            LayerselError: if they are not, or what was written is not right.
        """
        engine = self.run.engine
        if engine.is_streamed:
            raise LayerselError(
                f"{folder}: the adapter cannot be saved by one process alone under "
                f"{engine.name}, whose weights lie in shards. Call `trainer.save_model`."
            )
        fault = self.readiness.find_fault() if self.readiness else None
        if fault:
            raise LayerselError(fault)
        parameters = adapters.adapter_parameters(self.run.model, embeddings)
        tensors = {name: engine.gather_parameter(parameter).contiguous() for name, parameter in parameters.items()}
        held = {name: verification.fingerprint(p.detach().flatten()).tolist() for name, p in parameters.items()}
        self.write(Path(folder), tensors, held)

    def write(self, folder: Path, tensors: dict[str, torch.Tensor], held: dict[str, list[int]]) -> None:
        """Write whole tensors and check what was written; ``held``: their fingerprints on the ranks."""
        verification.check_gathered(folder / SAFETENSORS_WEIGHTS_NAME, tensors, held)
        config = self.run.config
        plain, plain_config = self.fold(tensors, config) if self.fold else (tensors, config)

        def check(stored: dict[str, torch.Tensor], stored_config: LoraConfig) -> None:
            self.check(folder, tensors, stored, stored_config)

        write_adapter(folder, plain, plain_config, check)

    def check(
        self, folder: Path, tensors: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], config: LoraConfig
    ) -> None:
        """Raise LayerselError unless what was read back computes what the model computes, see the class."""
        path, base = folder / SAFETENSORS_WEIGHTS_NAME, self.run.base
        modules, adapter = self.run.lora_modules, self.run.adapter
        if not self.computed:
            for name in sorted({*adapters.find_targets(config, base, adapter)} ^ modules.keys()):
                makes = "no LoRA on" if name in modules else "LoRA on"
                verification.fail(folder / CONFIG_NAME, f"PEFT would make {makes} {name} of it", verification.REPORT)
        for name in sorted(tensors.keys() ^ stored.keys()):
            fault = "was left out" if name in tensors else "is not of this model"
            verification.fail(path, f"{name} {fault}", verification.REPORT)
        for name, tensor in tensors.items():
            if stored[name].dtype != tensor.dtype:
                fault = f"{name} is {stored[name].dtype} in it, and {tensor.dtype} in training"
                verification.fail(path, fault, verification.REPORT)
        (live, _), (written, _) = split(tensors), split(stored)
        keys = {name: find_key(name, module) for name, module in modules.items()}
        found = find_scalings(config, keys.values())
        scalings = {name: found[key] for name, key in keys.items()}
        for name, module in modules.items():
            scaling, pair = module.scaling[adapter], live.get(name)
            if pair is not None and pair.down.dim() == pair.up.dim() == 2:
                gates = getattr(module.lora_A[adapter], GATE, None)
                gates = None if gates is None else gates.detach().cpu()
                verification.check_update(path, name, pair, scaling, gates, written[name], scalings[name])
            elif scaling != scalings[name]:
                fault = f"PEFT would scale LoRA on {name} by {scalings[name]}, which is {scaling} in training"
                verification.fail(folder / CONFIG_NAME, fault, verification.REPORT)
        if not self.computed:
            compared = self.compare_logits(path, stored, scalings)
            self.computed = True
            LOG.info(
                "layersel: the adapter in %s was read back: %s",
                folder,
                "logits under it are the model's" if compared else "its modules add what the model's add",
            )

    def compare_logits(self, path: Path, stored: dict[str, torch.Tensor], scalings: dict[str, float]) -> bool:
        """Return whether the model can be run with the adapter that was read back in place of its own, and was.

        Raises:
            LayerselError: if its logits are others then.
        """
        if self.run.engine.is_streamed:
            return False
        tokens = verification.find_probe_tokens(self.run)
        if tokens is None:
            return False
        with precision(self.run.trainer):  # which the model is given when it begins to train, and it may not have begun
            logits = verification.compute_logits(self.run.model, tokens)
            with hold_adapter(self.run, stored, scalings):
                found = verification.compute_logits(self.run.model, tokens)
        verification.check_logits(path, logits, found, verification.find_epsilon(self.run))
        return True


@contextlib.contextmanager
def hold_adapter(run: Run, tensors: dict[str, torch.Tensor], scalings: dict[str, float]) -> Iterator[None]:
    """Let a model whose weights are whole compute with a plain adapter, without gates, then with its own again."""
    adapter, modules = run.adapter, run.lora_modules
    own = {name: module.scaling[adapter] for name, module in modules.items()}
    gates = {
        linear: getattr(linear, GATE)
        for module in modules.values()
        for linear in module.lora_A.values()
        if hasattr(linear, GATE)
    }
    try:
        for name, module in modules.items():
            module.scaling[adapter] = scalings[name]
        for linear, gate in gates.items():
            setattr(linear, GATE, torch.ones(1, device=gate.device))
        with verification.hold(adapters.adapter_parameters(run.model, embeddings=True), tensors):
            yield
    finally:
        for name, module in modules.items():
            module.scaling[adapter] = own[name]
        for linear, gate in gates.items():
            setattr(linear, GATE, gate)
