"""A run in which nothing would train, or whose adapter was exchanged, is refused before the first step."""

import pytest
import torch
from helpers.models import make_small_llama
from helpers.processes import launch_processes
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def alone(zygote, tmp_path_factory):
    base = make_small_llama(attention_bias=True)
    return launch_processes(
        zygote, "helpers.readiness:train_beside_another", "single", tmp_path_factory.mktemp("alone"), base
    )


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_engines_train_beside_another_adapter_and_all_processes_refuse_what_one_did(engine, zygote, alone, tmp_path):
    base = make_small_llama(attention_bias=True)
    folder = launch_processes(zygote, "helpers.readiness:train_beside_another", engine, tmp_path, base)
    one, other = (load_file(place / "trained" / "adapter_model.safetensors") for place in (alone, folder))
    assert one.keys() == other.keys() and len([name for name in one if name.endswith("bias")]) == 3 * 2
    assert all(value.abs().max() > 1e-3 for name, value in one.items() if name.endswith("q_proj.base_layer.bias"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-4, rtol=1e-3)
    (refusals,) = {(folder / f"refusals-{rank}").read_text() for rank in (0, 1)}
    switched, idle, added = refusals.splitlines()
    assert switched.startswith("adapter: 'default' was prepared for training, but 'other' is active.")
    assert switched.endswith("Process 1 is affected, but not all processes are.")
    assert idle.startswith("adapter: none of the 36 LoRA matrices")
    assert idle.endswith("Process 0 is affected, but not all processes are.")
    assert added.startswith(
        "adapter: model.layers.0.self_attn.v_proj.lora_A.third.weight has the shape [3, 32] on process 0"
    )
    assert " and is not there on process 1 (12 such parameters). Engines match weights by their order" in added
