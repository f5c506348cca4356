"""LoRA weights and configuration of a model in training: initialise, remove, freeze, save, restore."""

import functools
import re
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel, ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import nn

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import refuse
from axolotl_layersel.common.randomness import draw_orthogonal, draw_row, make_row_generator
from axolotl_layersel.common.tensors import load_tensors
from axolotl_layersel.config.experts import KEY as EXPERTS_KEY
from axolotl_layersel.config.experts import describe_gated_experts
from axolotl_layersel.config.gate_requirements import check_gated_run
from axolotl_layersel.config.initialisation import RESTORED, SEEDED, changes_base, describe_rounding, normalise
from axolotl_layersel.engines import collectives, edits
from axolotl_layersel.engines.trainers import scales_loss
from axolotl_layersel.lora.layers import LayerStack
from axolotl_layersel.lora.layouts import sort_sets
from axolotl_layersel.lora.modules import (
    TRAINED_ADAPTER,
    carries,
    count_experts,
    find_key,
    find_lora_modules,
    get_active_adapter,
    get_adapter_name,
    get_base_model,
    get_config,
    get_linears,
    list_linear,
)
from axolotl_layersel.lora.patterns import list_ends
from axolotl_layersel.lora.run import Run

# From the adapter's tensors and configuration in training to those of a plain adapter.
Fold = Callable[[dict[str, torch.Tensor], LoraConfig], tuple[dict[str, torch.Tensor], LoraConfig]]
# Where PEFT reads the number of a module's layer: after the first name that a number follows.
NUMBERED_LAYER = re.compile(r".*?\.(?P<list>[^.]*)\.(?P<number>\d+)\.")


def get_initialisation(config: LoraConfig) -> bool | str:
    """Return ``init_lora_weights`` under the name that it has in ``initialisation``."""
    return normalise(config.init_lora_weights)


def complete_config(run: Run) -> None:
    """Complete the configuration with what PEFT adds when it saves, in an order that is the same in every run.

    Call it before the engine is built, because FSDP2 renames the model's class.
    """
    config, base = run.config, run.base
    if not config.base_model_name_or_path:
        # Of a model without a name PEFT 0.20.0 writes an empty one, 0.21.2 none.
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    sort_sets(config)


def check_plain_lora(run: Run, modules: dict[str, LoraLayer], setting: str) -> None:
    """Raise LayerselError unless gates can be put on LoRA modules: each is B·A·x·scaling with linear A and B.

    LoRA on the parameters of experts gets no gate, and is passed over.

    Args:
        run: whose adapter it is.
        modules: those that get gates, by name.
        setting: the YAML key that puts gates on them.
    """
    adapter, everything = run.adapter, modules
    modules = list_linear(everything)
    if everything and not modules:
        raise LayerselError(describe_gated_experts(setting))
    check_gated_run(
        setting,
        initialisation=run.config.init_lora_weights,
        has_dora=run.config.use_dora,
        fp16=scales_loss(run.trainer),
        restarts=run.trainer.args.auto_find_batch_size,
    )
    check_linear(run, modules, setting)
    for name, module in modules.items():
        if module.lora_variant.get(adapter) is not None or module.lora_bias.get(adapter):
            raise LayerselError(
                f"lora_target_modules: LoRA on {name} is not plain LoRA (DoRA, aLoRA, lora_bias or the like), which "
                f"{setting} does not support. Use plain LoRA."
            )


def check_linear(run: Run, modules: dict[str, LoraLayer], setting: str) -> None:
    """Raise LayerselError unless A and B of all ``modules`` are linear, as the YAML key ``setting`` needs them."""
    for name, module in modules.items():
        linear = run.adapter in module.lora_A and isinstance(module.lora_A[run.adapter], nn.Linear)
        shape = run.engine.find_shape(get_linears(module, run.adapter)[0].weight) if linear else ()
        if len(shape) != 2:
            raise LayerselError(
                f"lora_target_modules: {name} is a {type(module.get_base_layer()).__name__}, whose LoRA {setting} does "
                "not support. Target linear modules, such as q_proj and down_proj."
            )


@torch.no_grad()
def initialize_lora(model: PeftModel, seed: int) -> bool:
    """Draw the initial LoRA weights from ``seed``, in PEFT's distribution.

    PEFT draws them from the process's unseeded stream. Here each row of A comes from (seed, module name, row)
    alone, or with ``orthogonal`` a module from (seed, module name): the same on every engine and number of
    processes, whatever other layers carry LoRA. The global random state is not touched.

    Returns:
        Whether the weights were drawn. PiSSA and OLoRA depend on the base weights, so PEFT's result is kept there.
    """
    if get_initialisation(get_config(model)) not in SEEDED:
        return False
    for name, module in find_lora_modules(get_base_model(model), get_adapter_name(model)).items():
        initialize_module(model, name, module, seed)
    return True


@torch.no_grad()
def initialize_module(model: PeftModel, name: str, module: LoraLayer, seed: int, rank: int | None = None) -> None:
    """Draw the initial weights of one LoRA module, whose initialisation is in ``SEEDED``, see ``initialize_lora``.

    ``rank``: by which their size is chosen; default: the module's.
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


def find_others(stack: LayerStack, kept: list[str]) -> list[str]:
    """Return the names of the LoRA modules of the layers, except those ``kept``."""
    staying = set(kept)
    return [name for name in stack.list_modules(stack.lora_modules) if name not in staying]


def remove_unselected(run: Run, stack: LayerStack, kept: list[str]) -> None:
    """Put the base modules back in place of the LoRA modules of the layers, except those ``kept``."""
    remove_modules(run, find_others(stack, kept))


def remove_modules(run: Run, removed: list[str]) -> None:
    """Put the base modules back in place of the LoRA modules named ``removed``.

    Where another adapter has LoRA in such a module, only that of the adapter in training is removed. The configuration
    then names exactly the modules that carry the adapter, so that stock PEFT rebuilds them. Call it before LoRA has
    trained.

    Raises:
        LayerselError: if PEFT has changed the weight of such a module, and it cannot be what it was, or another
            adapter reads it.
    """
    base, lora = run.base, run.lora_modules
    restores, gone = changes_base(run.config.init_lora_weights), set(removed)
    if restores and removed:
        check_base_unshared(run)
    for name in removed:
        parent, _, child = name.rpartition(".")
        if child == "base_layer" and parent in lora:
            assert parent in gone, "LoRA on the parameters of one module is removed together"
            continue  # it went with what was around it
        if restores:
            restore_base(run, name, lora[name])
        freeze_bias(run, lora[name])
        if has_others(lora[name], run.adapter):
            remove_adapter(lora[name], run.adapter)
        else:
            setattr(base.get_submodule(parent), child, lora[name].get_base_layer())
    keys = {find_key(name, lora[name]) for name in removed if not has_others(lora[name], run.adapter)}
    tuner: Any = run.model.base_model
    tuner.targeted_module_names = [name for name in tuner.targeted_module_names if name not in keys]
    tuner.targeted_parameter_names = [name for name in tuner.targeted_parameter_names if name not in keys]
    name_exactly(run.config, base, run.adapter)


def has_others(module: LoraLayer, adapter: str) -> bool:
    """Return whether another adapter than ``adapter`` has LoRA in a module."""
    return any(name != adapter for name in module.r)


def remove_adapter(module: LoraLayer, adapter: str) -> None:
    """Remove the LoRA of ``adapter`` from a module in which others have LoRA; none of them becomes active by that."""
    parts: Any = module  # LoRA modules are torch's, which the type does not say
    trained = [parameter for parameter in parts.parameters() if parameter.requires_grad]
    module.set_adapter([])  # which stops the others from training, too
    module.delete_adapter(adapter)
    module.set_adapter([adapter])
    for parameter in trained:
        parameter.requires_grad_(True)


def check_base_unshared(run: Run) -> None:
    """Raise LayerselError where base weights would be restored under another adapter, which reads them."""
    others = [name for name in run.model.peft_config if name != run.adapter]
    if others:
        raise LayerselError(
            f"layersel.selection.unselected: remove gives base weights back what {run.config.init_lora_weights!r} took "
            f"out of them, and the adapter {others[0]!r} in the same model would then compute something else. Set "
            "`unselected: freeze`, or delete that adapter first."
        )


def freeze_bias(run: Run, module: LoraLayer) -> None:
    """Stop the bias under a LoRA module, which ``bias: lora_only`` lets train with its LoRA, from training."""
    bias = getattr(module.get_base_layer(), "bias", None)
    if run.config.bias == "lora_only" and isinstance(bias, nn.Parameter):
        bias.requires_grad_(False)


@torch.no_grad()
def restore_base(run: Run, name: str, module: LoraLayer) -> None:
    """Give the base weight of a module back the product of the initial factors, which PEFT took out of it.

    Raises:
        LayerselError: if that would not be the weight that it was.
    """
    weight, method = module.get_base_layer().get_parameter("weight"), get_initialisation(run.config)
    if method not in RESTORED:
        raise LayerselError(
            f"peft_init_lora_weights: {method!r} has changed the base weight of {name}, which cannot be undone. "
            "Set `unselected: freeze`, or remove peft_init_lora_weights."
        )
    if weight.dtype != torch.float32:
        raise LayerselError(describe_rounding(method, f"that of {name} is {str(weight.dtype).removeprefix('torch.')}"))
    transposed = getattr(module, "fan_in_fan_out", False)
    if transposed and method == "olora":
        raise LayerselError(
            f"peft_init_lora_weights: 'olora' takes {name}, a {type(module.get_base_layer()).__name__}, for its "
            "transpose, so PEFT computes something else from the start. Use `pissa`, or remove it."
        )
    down, up = (linear.weight.float() for linear in get_linears(module, run.adapter))
    product = module.scaling[run.adapter] * (up @ down)
    product = product.T if transposed else product
    run.engine.edit_weight(weight, edits.add(product))


def name_exactly(config: LoraConfig, base: nn.Module, adapter: str | None = None) -> None:
    """Make ``config`` name exactly the LoRA modules of ``base``, or those of ``adapter`` in it.

    The first of these that is exact is used: the ends of the names, such as ``q_proj``, with the numbers of the layers,
    which PEFT loads fastest; the full names; a regular expression. vLLM and SGLang read the ends of the names, and find
    the layers in the file's tensors. SGLang refuses regular expressions.
    """
    lora, others = find_lora_modules(base, adapter), list_other_modules(base, adapter)
    present = [name for name, module in lora.items() if not isinstance(module, ParamWrapper)]
    if len(present) < len(lora):
        config.target_parameters = sorted(find_key(name, lora[name]) for name in lora.keys() - set(present))
    elif config.target_parameters:
        config.target_parameters = None
    if not present:
        config.target_modules, config.layers_to_transform, config.layers_pattern = [], None, None
        return
    layers = [layer for name in present if (layer := NUMBERED_LAYER.match(name))]
    if len(layers) == len(present):
        config.target_modules = sorted({name.rpartition(".")[2] for name in present})
        config.layers_to_transform = sorted({int(layer["number"]) for layer in layers})
        config.layers_pattern = sorted({layer["list"] for layer in layers})
        if find_targets(config, base, adapter) == list(lora):
            return
    config.target_modules = sorted(present)
    config.layers_to_transform = None
    config.layers_pattern = None
    # PEFT takes a full name as the end of a longer one too.
    names = set(present)
    if not all(names.isdisjoint(list_ends(name)) for name in others):
        config.target_modules = "|".join(map(re.escape, sorted(present)))


def list_other_modules(base: nn.Module, adapter: str | None = None) -> list[str]:
    """Return the names of the modules of ``base`` that neither carry ``adapter``, by default any, nor lie in LoRA."""
    others, inside = [], "."
    for name, module in base.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, LoraLayer):
            inside = f"{name}."
        if not isinstance(module, LoraLayer) or not carries(module, adapter):
            others.append(name)
    return others


def list_targets(key: str) -> list[str]:
    """Return what in PEFT's ``target_parameters`` means the parameter ``key``."""
    return [key, *list_ends(key)]


def check_target_parameters(run: Run) -> None:
    """Raise LayerselError for a name in ``target_parameters`` of no parameter, which PEFT 0.20.0 passes over."""
    meant = {target for name, module in run.lora_modules.items() for target in list_targets(find_key(name, module))}
    unknown = [target for target in run.config.target_parameters or [] if target not in meant]
    if unknown:
        names = {name for name, parameter in run.base.named_parameters() if parameter.dim() > 2}
        ends = sorted({".".join(name.replace(".base_layer", "").split(".")[-3:]) for name in names})
        raise LayerselError(
            f"{EXPERTS_KEY}: {unknown[0]!r} is no parameter of this model that LoRA could be put on. Use names of its "
            f"experts, such as {', '.join(ends[:4]) or 'those of another model, for this one has none'}."
        )


def find_targets(config: LoraConfig, base: nn.Module, adapter: str | None = None) -> list[str]:
    """Return the names of the modules that PEFT would put LoRA on if ``base`` had none; LoRA modules come first.

    Those of ``adapter`` are meant, by default all. Where LoRA would be on a parameter that has none, it is the
    parameter's name.
    """
    lora, others = find_lora_modules(base, adapter), list_other_modules(base, adapter)
    targets = set(config.target_parameters or [])

    def is_target(key: str) -> bool:
        return not targets.isdisjoint(list_targets(key))

    found = [
        name
        for name in (*lora, *others)
        if (
            is_target(find_key(name, lora[name]))
            if isinstance(lora.get(name), ParamWrapper)
            else check_target_module_exists(config, name)
        )
    ]
    owners = others if targets else []
    bare = [f"{name}.{key}" for name in owners for key, _ in base.get_submodule(name).named_parameters(recurse=False)]
    return [*found, *filter(is_target, bare)]


def freeze_unselected(run: Run, stack: LayerStack, kept: list[str]) -> None:
    """Stop the LoRA weights of the layers, and the biases under them, from training, except the modules ``kept``.

    Their values stay.
    """
    lora = run.lora_modules
    for name in find_others(stack, kept):
        bias = getattr(lora[name].get_base_layer(), "bias", None)  # trains too where the adapter's ``bias`` says so
        for parameter in [*lora_parameters(run, name), *([bias] if isinstance(bias, nn.Parameter) else [])]:
            parameter.requires_grad_(False)


def lora_parameters(run: Run, name: str) -> list[nn.Parameter]:
    """Return the parameters that the run's adapter has of its own in the LoRA module ``name``."""
    named = run.base.get_submodule(name).named_parameters()
    return [each for key, each in named if not key.startswith("base_layer.") and run.adapter in key.split(".")]


def keep_trained_alone(model: PeftModel) -> None:
    """Make sure that what trains now is what trains whenever the adapter is active, whatever PEFT is asked to do.

    PEFT 0.20.0 makes every LoRA weight of an adapter train when it switches the adapter on, frozen ones too, and stops
    all of them when it loads another adapter. Trainers that compare with a reference switch adapters in every loss.
    """
    tuner: Any = model.base_model
    vars(tuner)[TRAINED_ADAPTER] = get_active_adapter(model)
    vars(tuner).pop(KEPT_WEIGHTS, None)  # of another adapter, which trained before
    # Methods, not closures: a deep copy of the model switches its own adapter off.
    for name, method in KEEPING_METHODS.items():
        setattr(tuner, name, types.MethodType(method, tuner))


def keep_through(name: str) -> Callable[..., Any]:
    """Return what takes the place of a tuner's method ``name``, after which the same weights train as before.

    Where the call leaves the adapter switched off or inactive, they train again once it is back.
    """

    @functools.wraps(getattr(LoraModel, name))
    def method(tuner: BaseTuner, *args: Any, **options: Any) -> Any:
        before = list_trained(tuner) if is_switched_on(tuner) else None
        result = getattr(type(tuner), name)(tuner, *args, **options)
        if is_switched_on(tuner):
            let_train(tuner, before)
        elif before is not None:
            vars(tuner).setdefault(KEPT_WEIGHTS, before)
        return result

    return method


@functools.wraps(LoraModel.set_requires_grad)
def set_requires_grad(tuner: BaseTuner, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let an adapter's weights train or not; of the adapter in training, only those train again that did."""
    before = list_trained(tuner)
    type(tuner).set_requires_grad(tuner, adapter_names, requires_grad)
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    if vars(tuner)[TRAINED_ADAPTER] not in names or not is_switched_on(tuner):
        return
    if requires_grad:
        let_train(tuner, before)
    else:
        vars(tuner).setdefault(KEPT_WEIGHTS, before)


def is_switched_on(tuner: BaseTuner) -> bool:
    """Return whether the adapter in training takes part in a forward pass."""
    layers = (module for module in tuner.modules() if isinstance(module, BaseTunerLayer))
    return tuner.active_adapters == [vars(tuner)[TRAINED_ADAPTER]] and not any(
        layer.disable_adapters for layer in layers
    )


def list_trained(tuner: BaseTuner) -> set[str]:
    """Return the names of the parameters that train."""
    return {name for name, parameter in tuner.named_parameters() if parameter.requires_grad}


def let_train(tuner: BaseTuner, before: set[str] | None) -> None:
    """Let those parameters train that did when the adapter was switched off, or else those ``before``, and no other."""
    names = vars(tuner).pop(KEPT_WEIGHTS, before)
    for name, parameter in tuner.named_parameters() if names is not None else ():
        if parameter.requires_grad != (name in names) and parameter.is_leaf:  # FSDP2 may have left other tensors
            parameter.requires_grad_(name in names)


KEPT_WEIGHTS = "layersel_trained"
# By all of these methods of PEFT 0.20.0's tuners weights train that did not, or the other way round.
SWITCHES = ("disable_adapter_layers", "enable_adapter_layers", "set_adapter", "inject_adapter", "delete_adapter")
KEEPING_METHODS: dict[str, Callable[..., Any]] = {
    **{name: keep_through(name) for name in SWITCHES},
    "set_requires_grad": set_requires_grad,
}


def adapter_parameters(model: PeftModel, embeddings: bool | Literal["auto"] = False) -> dict[str, nn.Parameter]:
    """Return the parameters that an adapter file holds, by their name in that file (PEFT's naming); tied ones twice.

    ``embeddings``: whether base embeddings are among them; ``"auto"`` where PEFT would save them, after the
    vocabulary was resized, for which it may look the base's configuration up.
    """
    adapter, named = get_adapter_name(model), dict(model.named_parameters(remove_duplicate=False))
    saved = get_peft_model_state_dict(model, state_dict=named, adapter_name=adapter, save_embedding_layers=embeddings)
    if get_config(model, adapter).bias != "lora_only":
        return saved
    # PEFT 0.20.0 looks for these biases where they were before LoRA was put around them, and leaves them out.
    under = (f"{name}.base_layer.bias" for name in find_lora_modules(model, adapter))
    return {**saved, **{name: named[name] for name in under if name in named}}


def find_adapter(run: Run) -> dict[str, nn.Parameter]:
    """Return the parameters of the adapter's file by name, as the engine trains them; every rank must call this.

    FSDP2 may have left whole copies of them in the model, in the precision of a forward pass. They are dropped.
    """
    run.engine.reshard()
    names = collectives.decide_on_rank_zero(lambda: list(adapter_parameters(run.model, embeddings="auto")))
    parameters = adapter_parameters(run.model, embeddings=True)
    return {name: parameters[name] for name in names}


def load_adapter_tensors(run: Run, path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors in the file ``path``, under ``prefix``, that the model has parameters for.

    Raises:
        LayerselError: if the file is missing or damaged, or its tensors are not those of the adapter in training.
    """
    key, way_out = "resume_from_checkpoint", "Resume a checkpoint of this run."
    stored, _ = load_tensors(key, path, way_out)
    stored = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    for name in adapter_parameters(run.model):
        if name not in stored:
            raise refuse(key, path, f"does not hold this run's {name}", way_out)
    parameters = adapter_parameters(run.model, embeddings=True)
    for name, tensor in stored.items():
        if name not in parameters:
            raise refuse(key, path, f"holds {name}, which this run does not have", way_out)
        shape = run.engine.find_shape(parameters[name])
        if tensor.shape != shape or not tensor.is_floating_point():
            fault = f"holds {name} as {tensor.dtype} of shape {tuple(tensor.shape)}, and this run's is {tuple(shape)}"
            raise refuse(key, path, fault, way_out)
    return stored


@torch.no_grad()
def restore_adapter(run: Run, path: Path, prefix: str = "") -> None:
    """Write the adapter's tensors in the file ``path`` into a model whose weights are whole, before an engine exists.

    Raises:
        LayerselError: if the file's tensors are not those of the model.
    """
    parameters = adapter_parameters(run.model, embeddings=True)
    for name, value in load_adapter_tensors(run, path, prefix).items():
        parameters[name].copy_(value)


def restore_live_adapter(run: Run, path: Path, prefix: str = "") -> None:
    """Write the adapter's tensors in the file ``path`` into a model in training; every rank must call this.

    ``prefix``: before the names of the adapter's tensors in the file.

    Raises:
        LayerselError: if the file's tensors are not those of the model.
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
