"""The weights of the adapter: draw, list and restore them."""

from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import refuse
from axolotl_layersel.common.randomness import draw_orthogonal, draw_row, make_row_generator
from axolotl_layersel.common.tensors import load_tensors
from axolotl_layersel.config.initialisation import PLAIN, SEEDED, normalise
from axolotl_layersel.engines import collectives
from axolotl_layersel.lora.modules import (
    count_experts,
    find_key,
    find_lora_modules,
    get_adapter_name,
    get_base_model,
    get_config,
    get_linears,
    list_parameters,
)
from axolotl_layersel.lora.run import Run


def get_initialisation(config: LoraConfig) -> bool | str:
    """Return ``init_lora_weights`` as ``config.initialisation`` spells it."""
    return normalise(config.init_lora_weights)


def check_untrained(run: Run) -> None:
    """Raise LayerselError on every process if the adapter, whose weights would be drawn anew, is a trained one.

    Every process must call this, before the engine is built. Where no factor starts at zero, training does not show.
    """
    if get_initialisation(run.config) not in PLAIN:
        return

    def find_trained() -> str | None:
        for name, module in run.lora_modules.items():
            if run.adapter in module.lora_B:
                started_at_zero = module.lora_B[run.adapter].get_parameter("weight")
            elif run.adapter in module.lora_embedding_A:
                started_at_zero = module.lora_embedding_A[run.adapter]
            else:
                continue
            if started_at_zero.any():
                return name
        return None

    # With FSDP's cpu_ram_efficient_loading only process 0 holds weights.
    trained = collectives.decide_on_rank_zero(find_trained)
    if trained is not None:
        raise LayerselError(
            f"continues_adapter: False draws the LoRA weights anew, and those of {trained} are trained already. Give "
            "`prepare_trainer` continues_adapter=True to train them further, or build the model and a new adapter."
        )


@torch.no_grad()
def initialize_lora(model: PeftModel, seed: int) -> bool:
    """Draw the initial LoRA weights from ``seed``, in PEFT's distribution.

    A row of A depends only on (seed, module name, row); with ``orthogonal`` a module depends on (seed, module name).
    The weights are therefore the same on every engine, on any number of processes, and whatever other layers carry
    LoRA. The global random state is not touched.

    Returns:
        Whether the weights were drawn. PiSSA and OLoRA depend on the base weights, so PEFT's result stays.
    """
    if get_initialisation(get_config(model)) not in SEEDED:
        return False
    for name, module in find_lora_modules(get_base_model(model), get_adapter_name(model)).items():
        initialize_module(model, name, module, seed)
    return True


@torch.no_grad()
def initialize_module(model: PeftModel, name: str, module: LoraLayer, seed: int, rank: int | None = None) -> None:
    """Draw the initial weights of one LoRA module, see ``initialize_lora``.

    ``rank``: the rank that sets their scale; default: the module's.
    """
    adapter, method = get_adapter_name(model), get_initialisation(get_config(model))
    if method == "orthogonal":
        down, up = (linear.weight for linear in get_linears(module, adapter))
        values = draw_orthogonal(down.shape[1], up.shape[0], down.shape[0], make_row_generator(seed, name, 0))
        for weight, value in zip((down, up), values):
            weight.copy_(value)
    elif adapter in module.lora_A:
        weight = module.lora_A[adapter].get_parameter("weight")
        experts, key, size = count_experts(module), find_key(name, module), rank or module.r[adapter]
        names = [f"{key}.{expert}" for expert in range(experts)] if isinstance(module, ParamWrapper) else [key]
        places = [(drawn, i) for drawn in names for i in range(weight.shape[0] // experts)]
        rows = [draw_row(weight[0], method, seed, drawn, i, size) for drawn, i in places]
        weight.copy_(torch.stack(rows))
        nn.init.zeros_(module.lora_B[adapter].get_parameter("weight"))
    elif adapter in module.lora_embedding_A:
        weight = module.lora_embedding_B[adapter]
        generators = [make_row_generator(seed, name, i) for i in range(weight.shape[1])]
        columns = [torch.randn(weight.shape[0], generator=generator) for generator in generators]
        weight.copy_(torch.stack(columns, dim=1))
        nn.init.zeros_(module.lora_embedding_A[adapter])


def lora_parameters(run: Run, name: str) -> list[nn.Parameter]:
    """Return the parameters of the run's adapter in the LoRA module ``name``."""
    return list_parameters(run.base, run.adapter, name)


def adapter_parameters(model: PeftModel, embeddings: bool | Literal["auto"] = False) -> dict[str, nn.Parameter]:
    """Return the parameters of an adapter file by their name in the file; tied parameters appear twice.

    ``embeddings``: whether to include base embeddings; ``"auto"`` leaves it to PEFT, which includes them after the
    vocabulary was resized and may look up the base model's configuration.
    """
    adapter, named = get_adapter_name(model), dict(model.named_parameters(remove_duplicate=False))
    saved = get_peft_model_state_dict(model, state_dict=named, adapter_name=adapter, save_embedding_layers=embeddings)
    if get_config(model, adapter).bias != "lora_only":
        return saved
    # PEFT 0.20.0 looks for these biases at their names without LoRA, and so leaves them out.
    under = (f"{name}.base_layer.bias" for name in find_lora_modules(model, adapter))
    return {**saved, **{name: named[name] for name in under if name in named}}


def find_adapter(run: Run) -> dict[str, nn.Parameter]:
    """Return the parameters of the adapter file by name, as the engine trains them; every process must call this."""
    run.engine.reshard()  # drops whole copies that an FSDP2 forward pass may have left, in its own precision
    names = collectives.decide_on_rank_zero(lambda: list(adapter_parameters(run.model, embeddings="auto")))
    parameters = adapter_parameters(run.model, embeddings=True)
    return {name: parameters[name] for name in names}


def load_adapter_tensors(run: Run, path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the adapter's tensors in the file ``path``, without the ``prefix`` of their names.

    Raises:
        LayerselError: if the file is missing or damaged, or does not match the adapter in training.
    """
    key, way_out = "resume_from_checkpoint", "Resume a checkpoint of this run."
    stored, _ = load_tensors(key, path, way_out)
    stored = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    for name in adapter_parameters(run.model):
        if name not in stored:
            raise refuse(key, path, f"lacks this run's {name}", way_out)
    parameters = adapter_parameters(run.model, embeddings=True)
    for name, tensor in stored.items():
        if name not in parameters:
            raise refuse(key, path, f"has {name}, which this run lacks", way_out)
        shape = run.engine.find_shape(parameters[name])
        if tensor.shape != shape or not tensor.is_floating_point():
            fault = f"has {name} of {tensor.dtype} and shape {tuple(tensor.shape)}, this run has shape {tuple(shape)}"
            raise refuse(key, path, fault, way_out)
    return stored


@torch.no_grad()
def restore_adapter(run: Run, path: Path, prefix: str = "") -> None:
    """Load the adapter in the file ``path`` into a model with whole weights, before the engine is built.

    Raises:
        LayerselError: if the file does not match the model.
    """
    parameters = adapter_parameters(run.model, embeddings=True)
    for name, value in load_adapter_tensors(run, path, prefix).items():
        parameters[name].copy_(value)


def restore_live_adapter(run: Run, path: Path, prefix: str = "") -> None:
    """Load the adapter in the file ``path`` into a model in training; every process must call this.

    ``prefix``: prefix of the adapter's tensor names in the file.

    Raises:
        LayerselError: if the file does not match the model.
    """
    tensors: dict[str, torch.Tensor] = {}

    def load() -> list[str]:
        tensors.update(load_adapter_tensors(run, path, prefix))
        return list(tensors)

    names = collectives.decide_on_rank_zero(load)
    run.engine.reshard()
    parameters = adapter_parameters(run.model, embeddings=True)
    for name in names:
        run.engine.write_parameter(parameters[name], tensors.get(name))
