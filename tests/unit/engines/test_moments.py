"""Moments as the libraries themselves keep them: real optimizers, after real steps.

bitsandbytes 0.50.2 runs its 8-bit optimizers on the CPU. There it pages nothing, so that ``release_pages`` sees tensors
here that are listed and marked as it lists and marks paged ones; ``benchmarks/gpu.py`` pages on a GPU.
"""

import importlib
import inspect
import types
from collections.abc import Callable, Iterator

import bitsandbytes
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torchao.optim import adam as torchao_adam
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.engines.base import Engine
from axolotl_layersel.engines.moments import (
    LAYOUTS,
    LEAVES_IDLE,
    find_library,
    find_maps,
    find_moments,
    find_zero,
    release_pages,
    unwrap_optimizer,
)

# From 4096 elements on moments are codes. A row of the large one lies in blocks of 256 with parts of its neighbours.
SMALL, LARGE = (6, 40), (48, 96)
OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "AdamW with amsgrad": lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "bitsandbytes AdamW": bitsandbytes.optim.AdamW,
    "bitsandbytes AdamW8bit": bitsandbytes.optim.AdamW8bit,
    "bitsandbytes AdamW of 8 bits": lambda parameters: bitsandbytes.optim.AdamW(parameters, optim_bits=8),
    "bitsandbytes PagedAdamW8bit": bitsandbytes.optim.PagedAdamW8bit,
    "bitsandbytes PagedAdamW32bit": bitsandbytes.optim.PagedAdamW32bit,
    "torchao AdamW8bit": torchao_adam.AdamW8bit,
    "torchao AdamWFp8": torchao_adam.AdamWFp8,
}
CODED = ("8bit", "8 bits", "Fp8")


@pytest.fixture(autouse=True)
def without_compiling(monkeypatch) -> None:
    """Keep torchao from compiling its step, which takes long on a CPU and computes the same."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def train(name: str, shapes: tuple[tuple[int, int], ...] = (SMALL, LARGE), steps: int = 3):
    """Return an optimizer, and its parameters after some steps."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = OPTIMIZERS[name](parameters)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * torch.rand_like(parameter)
        optimizer.step()
    return optimizer, parameters


def read_numbers(state: dict, name: str) -> torch.Tensor:
    """Return the numbers of a moment, as its own library computes them."""
    value, number = state[name], name.removeprefix("state")
    if f"absmax{number}" in state:
        scales, codes = state[f"absmax{number}"], state[f"qmap{number}"]
        return bitsandbytes.functional.dequantize_blockwise(value, absmax=scales, code=codes, blocksize=256)
    return value.dequantize() if hasattr(value, "dequantize") and hasattr(value, "codes") else value.clone()


def list_tensors(state: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """Return every plain tensor in the state of a weight: moments, codes, scales, maps, and numbers of steps."""
    for name, value in state.items():
        if hasattr(value, "codes"):
            yield f"{name}.codes", value.codes.view(torch.uint8)
            yield f"{name}.scale", value.scale
            if hasattr(value, "qmap"):
                yield f"{name}.qmap", value.qmap
        else:
            yield name, torch.as_tensor(value)


def copy_tensors(state: dict) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in list_tensors(state)}


def make_engine(optimizer: torch.optim.Optimizer) -> Engine:
    """Return the engine of one process; a trainer's optimizer is all that it reads here."""
    return Engine(types.SimpleNamespace(optimizer=optimizer), "single")


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_some_components_become_zero_and_all_else_stays_bit_for_bit(name, dim):
    optimizer, parameters = train(name)
    for parameter in parameters:
        state = optimizer.state[parameter]
        moments = find_moments(state, name)
        names = [moment.name for moment in moments]
        assert names == [key for key in LAYOUTS[find_library(type(optimizer))].names if key in state]
        is_coded = parameter.shape == LARGE and any(mark in name for mark in CODED)
        assert all((moment.values.dtype == torch.uint8) == is_coded for moment in moments)
        assert all(moment.values.shape == parameter.shape for moment in moments)

        before, numbers = copy_tensors(state), {key: read_numbers(state, key) for key in names}
        components = torch.tensor([0, 3, 5])
        others = [i for i in range(parameter.shape[dim]) if i not in components]
        assert all(value.index_select(dim, components).count_nonzero() > 10 for value in numbers.values())
        make_engine(optimizer).zero_moments(parameter, components, dim)

        for key, value in numbers.items():
            after = read_numbers(state, key)
            assert (after.index_select(dim, components) == 0).all()
            assert torch.equal(
                after.index_select(dim, torch.tensor(others)), value.index_select(dim, torch.tensor(others))
            )
        written = {f"{key}.codes" if f"{key}.codes" in before else key for key in names}
        for key, value in list_tensors(state):
            if key in written:
                kept = torch.tensor(others)
                assert torch.equal(value.index_select(dim, kept), before[key].index_select(dim, kept)), key
                assert not torch.equal(value, before[key]), key
            else:
                assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_step_starts_from_the_zeros(name):
    """A component without moments and without a gradient moves by weight decay alone."""
    optimizer, parameters = train(name)
    for parameter in parameters:
        make_engine(optimizer).zero_moments(parameter, torch.tensor([2]), 0)
        parameter.grad = torch.randn_like(parameter)
        parameter.grad[2] = 0
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    (group,) = optimizer.param_groups
    kept = 1 - float(group["lr"]) * group["weight_decay"] if name != "Adam" else 1.0
    for parameter, was in zip(parameters, before):
        # fp32 rounds the product with what decay leaves.
        torch.testing.assert_close(parameter[2], was[2] * kept, atol=0, rtol=1e-6)
        assert ((parameter - was * kept).abs()[[0, 1, 3]] > 1e-5).float().mean() > 0.9


@pytest.mark.parametrize("factor", [0.5, 3.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_scaled_as_those_of_larger_gradients_would_be(name, factor):
    optimizer, parameters = train(name)
    for parameter in parameters:
        state = optimizer.state[parameter]
        moments = find_moments(state, name)
        before = {moment.name: read_numbers(state, moment.name) for moment in moments}
        values = {moment.name: moment.values.clone() for moment in moments}
        make_engine(optimizer).scale_moments(parameter, factor)
        for moment in moments:
            order = 1 if moment.name in ("exp_avg", "state1") else 2
            expected = before[moment.name] * factor**order
            torch.testing.assert_close(read_numbers(state, moment.name), expected, atol=0, rtol=1e-6)
            if moment.values.dtype == torch.uint8:
                assert torch.equal(moment.values, values[moment.name]), "only the scales of the blocks change"
    # The next step has the length of a step whose gradients were always so large.
    again, others = train(name)
    for one, other in zip(parameters, others):
        one.grad = torch.randn_like(one)
        other.grad = one.grad / factor
    optimizer.step()
    again.step()
    for one, other in zip(parameters, others):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


@pytest.mark.parametrize("factor", [0.6, 1.6])
def test_codes_whose_blocks_hold_other_weights_too_become_the_nearest(factor):
    """DeepSpeed joins weights before bitsandbytes makes blocks of them, and gives a weight's codes without scales."""
    optimizer, (_, parameter) = train("bitsandbytes AdamW8bit")
    state = optimizer.state[parameter]
    bare = {name: state[name] for name in ("state1", "state2", "qmap1", "qmap2")}
    before = {name: read_numbers(state, name) for name in ("state1", "state2")}
    for moment in find_moments(bare, "AdamW8bit"):
        assert moment.scales is None
        moment.scale(factor)(moment.values.view(-1), 0, parameter.shape)
        expected, found = before[moment.name] * factor**moment.order, read_numbers(state, moment.name)
        highest = state[moment.name.replace("state", "absmax")].repeat_interleave(256).view(parameter.shape)
        expected = expected.clamp(-highest, highest)
        # A code differs from its neighbours by at most a fiftieth of the scale, and relatively by less than half.
        assert ((found - expected).abs() <= 0.02 * highest).all()
        assert (found[before[moment.name] == 0] == 0).all()


def test_a_weight_that_no_gradient_has_reached_has_no_moments_to_clear():
    for name in OPTIMIZERS:
        optimizer, (reached, _) = train(name)
        other = torch.nn.Parameter(torch.ones(4, 4))
        make_engine(optimizer).zero_moments(other, torch.tensor([0]), 0)
        make_engine(optimizer).scale_moments(other, 2.0)
        assert other not in optimizer.state and optimizer.state[reached]


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
        torch.optim.Adafactor,
        torch.optim.Adamax,
        bitsandbytes.optim.Lion8bit,
        torchao_adam.AdamW4bit,
    ],
)
def test_moments_that_are_kept_in_another_way_are_refused_by_the_optimizers_name(make):
    parameter = torch.nn.Parameter(torch.randn(LARGE))
    optimizer = make([parameter])
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    name = type(optimizer).__name__
    assert find_library(type(optimizer)) is None
    message = f"cannot move rank with {name}, because it does not know where .* are. Use `optimizer: adamw_torch`"
    with pytest.raises(LayerselError, match=message):
        make_engine(optimizer).zero_moments(parameter, torch.tensor([0]), 0)


def test_every_class_that_is_said_to_keep_moments_is_there():
    for library, layout in LAYOUTS.items():
        for name in layout.optimizers:
            module, _, kind = name.rpartition(".")
            found = getattr(importlib.import_module(module), kind)
            assert found.__module__ == module and issubclass(found, torch.optim.Optimizer)
            assert find_library(found) == library, name


def test_a_class_of_ones_own_keeps_moments_as_the_class_does_that_it_is_made_from():
    class Own(bitsandbytes.optim.AdamW8bit):
        pass

    assert find_library(Own) == "bitsandbytes"


def test_deepspeeds_own_adam_keeps_torchs_moments():
    from deepspeed.ops.adam import cpu_adam, fused_adam

    for kind in (cpu_adam.DeepSpeedCPUAdam, fused_adam.FusedAdam):
        source = inspect.getsource(kind)
        for name in LAYOUTS["PyTorch"].names[:2]:
            assert f"state['{name}'] = torch.zeros_like" in source, kind


def test_the_code_for_zero_is_in_every_map_once():
    for signed in (True, False):
        numbers = bitsandbytes.functional.create_dynamic_map(signed=signed)
        assert numbers.tolist().count(0.0) == 1 and numbers[find_zero(numbers)] == 0
        own = importlib.import_module("torchao.optim.quant_utils").create_dynamic_map(signed=signed)
        assert own.count(0.0) == 1


def test_an_optimizer_of_bitsandbytes_has_one_map_for_all_weights():
    optimizer, (small, large) = train("bitsandbytes AdamW8bit", (SMALL, LARGE))
    maps = find_maps(optimizer.state)
    assert maps.keys() == {"qmap1", "qmap2"} and maps["qmap1"] is optimizer.state[large]["qmap1"]
    assert not any(key.startswith("qmap") for key in optimizer.state[small])
    assert find_maps(train("bitsandbytes AdamW")[0].state) == {}


def test_the_optimizer_inside_of_what_is_around_it_is_found():
    optimizer, _ = train("AdamW")
    wrapped = types.SimpleNamespace(optimizer=types.SimpleNamespace(optimizer=optimizer))
    assert unwrap_optimizer(wrapped) is unwrap_optimizer(optimizer) is optimizer


@pytest.fixture
def manager():
    """The list of paged tensors of bitsandbytes, restored after the test."""
    found = bitsandbytes.functional.GlobalPageManager.get_instance()
    before = list(found.paged_tensors)
    yield found
    found.paged_tensors[:] = before


def test_the_paged_memory_of_an_optimizer_that_has_ended_is_let_go_of_and_no_others(manager, monkeypatch):
    ended, parameters = train("bitsandbytes PagedAdamW8bit")
    going_on, _ = train("bitsandbytes PagedAdamW32bit")
    for optimizer in (ended, going_on):
        for state in optimizer.state.values():
            manager.paged_tensors += [state["state1"], state["state2"]]
    for state in ended.state.values():
        state["state1"].is_paged = True
    prefetched = []
    # It calls CUDA.
    monkeypatch.setattr(
        bitsandbytes.functional, "prefetch_tensor", lambda tensor, to_cpu=False: prefetched.append((id(tensor), to_cpu))
    )
    expected = [id(value) for state in going_on.state.values() for value in (state["state1"], state["state2"])]
    moved = {(id(ended.state[parameter]["state1"]), True) for parameter in parameters}
    release_pages(types.SimpleNamespace(optimizer=ended))
    assert [id(tensor) for tensor in manager.paged_tensors] == expected
    assert set(prefetched) == moved


def test_without_an_optimizer_no_paged_memory_is_let_go_of(manager):
    manager.paged_tensors.append(torch.ones(3))
    before = list(manager.paged_tensors)
    release_pages(None)
    release_pages(train("AdamW")[0])
    assert all(one is two for one, two in zip(manager.paged_tensors, before, strict=True))


def test_bitsandbytes_lists_and_marks_its_paged_memory_as_it_is_looked_for():
    optimizer = inspect.getsource(bitsandbytes.optim.optimizer.Optimizer8bit.get_state_buffer)
    assert "self.page_mng.paged_tensors.append(buff)" in optimizer
    assert "out.is_paged = True" in inspect.getsource(bitsandbytes.functional.get_paged)
    assert "to_cpu" in inspect.signature(bitsandbytes.functional.prefetch_tensor).parameters


# What ``CONFLICTS`` in l1ra/args.py refuses for; where one of these passes now, look whether that is still needed.


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "PagedAdamW32bit", "PagedAdamW8bit"])
def test_bitsandbytes_cannot_compute_on_the_weights_of_fsdp2(mesh, name):
    parameter = torch.nn.Parameter(distribute_tensor(torch.randn(LARGE), mesh, [Shard(0)]))
    parameter.grad = torch.randn_like(parameter)
    with pytest.raises(RuntimeError, match=r"does not have a sharding strategy|got mixed torch\.Tensor and DTensor"):
        getattr(bitsandbytes.optim, name)([parameter]).step()


@pytest.mark.parametrize("kind", [OptimState8bit, OptimStateFp8])
def test_torchaos_moments_cannot_be_cut_within_a_block_as_deepspeed_cuts(kind):
    moment = kind.zeros((4096,), block_size=256)
    assert moment.narrow(0, 256, 512).codes.shape == (512,)
    with pytest.raises(ValueError, match="align with block boundary"):
        moment.narrow(0, 100, 512)


@pytest.mark.parametrize(
    ("optimizer", "library"), [(torch.optim.AdamW, "PyTorch"), (bitsandbytes.optim.AdamW8bit, "bitsandbytes")]
)
def test_weights_of_0_without_gradients_stay_there_where_gates_are_left_out_for_it_and_only_there(optimizer, library):
    """As components that take no part, beside others in a block of moments."""
    weight = torch.nn.Parameter(torch.zeros(1024, 8))
    steps = optimizer([weight], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        weight.grad = torch.zeros(1024, 8)
        weight.grad[:, :4] = torch.randn(1024, 4, generator=generator) * 1e-3
        steps.step()
    assert weight[:, :4].all()
    assert bool(weight[:, 4:].any()) == (library not in LEAVES_IDLE)
