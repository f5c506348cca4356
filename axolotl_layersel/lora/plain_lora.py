"""Check that LoRA modules are plain linear ones, as gates and rank changes require."""

from peft.tuners.lora import LoraLayer
from torch import nn

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.experts import describe_gated_experts
from axolotl_layersel.config.gate_requirements import check_gated_run
from axolotl_layersel.engines.trainers import scales_loss
from axolotl_layersel.lora.modules import get_linears, list_linear
from axolotl_layersel.lora.run import Run


def check_plain_lora(run: Run, modules: dict[str, LoraLayer], setting: str) -> None:
    """Raise LayerselError unless each LoRA module can carry a gate: it adds B·A·x·scaling with linear A and B.

    LoRA on expert parameters gets no gate and is skipped.

    Args:
        run: the run that owns the adapter.
        modules: the modules that are to get gates, by name.
        setting: the YAML key that asks for gates.
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
    """Raise LayerselError unless A and B of all ``modules`` are linear, as the YAML key ``setting`` requires."""
    for name, module in modules.items():
        linear = run.adapter in module.lora_A and isinstance(module.lora_A[run.adapter], nn.Linear)
        shape = run.engine.find_shape(get_linears(module, run.adapter)[0].weight) if linear else ()
        if len(shape) != 2:
            raise LayerselError(
                f"lora_target_modules: {name} is a {type(module.get_base_layer()).__name__}, whose LoRA {setting} does "
                "not support. Target linear modules, such as q_proj and down_proj."
            )
