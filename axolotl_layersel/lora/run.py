"""A run: its trainer, its engine, and the model with its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, Trainer

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.engines import find_engine
from axolotl_layersel.engines.base import Engine
from axolotl_layersel.engines.trainers import unwrap_model
from axolotl_layersel.lora.modules import find_lora_modules, get_active_adapter, get_base_model, get_config


@dataclass(frozen=True)
class Run:
    """A trainer whose model is a PEFT model with one LoRA adapter.

    Attributes:
        trainer: the trainer; it may have trained.
        engine: the engine that it runs on.
        model: its model, unwrapped; the object stays the same when an engine is built around it.
        adapter: the name of the adapter in training.
    """

    trainer: Trainer
    engine: Engine
    model: PeftModel
    adapter: str

    @classmethod
    def of(cls, trainer: Trainer) -> Run:
        """Return the run of ``trainer``.

        Raises:
            LayerselError: if its engine is not supported, or its model does not have exactly one active LoRA adapter.
        """
        engine, model = find_engine(trainer), unwrap_model(trainer)
        if not isinstance(model, PeftModel):
            raise LayerselError(
                f"adapter: the trainer's model is a {type(model).__name__}, not a PEFT model with LoRA."
            )
        return cls(trainer, engine, model, get_active_adapter(model))

    @property
    def config(self) -> LoraConfig:
        return get_config(self.model, self.adapter)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model that carries the adapter."""
        return get_base_model(self.model)

    @property
    def lora_modules(self) -> dict[str, LoraLayer]:
        """The modules that carry the adapter, by name in the base model."""
        return find_lora_modules(self.base, self.adapter)

    @property
    def device(self) -> torch.device:
        return self.trainer.args.device

    @property
    def output_dir(self) -> Path:
        assert self.trainer.args.output_dir is not None, "transformers fills it in"
        return Path(self.trainer.args.output_dir)
