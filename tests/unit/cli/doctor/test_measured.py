"""Each number of ``doctor`` is compared with a measurement on a small model."""

import contextlib

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.optim import AdamW8bit
from helpers.examined import TARGETS, collect, make_case
from helpers.models import make_lora, make_rows, make_selection, make_small_llama, make_trainer
from helpers.settings import CHECKPOINTING, l1ra, selection
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from axolotl_layersel.cli.doctor import collectives as communication
from axolotl_layersel.cli.doctor import disk, layers, memory, rows, serving, time
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.l1ra.callback import RankCallback
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.readers import find_readers, read_adapter_file
from axolotl_layersel.lora.step_time import count_step, count_work
from axolotl_layersel.selection.backward_cut import TruncatedBackward
from axolotl_layersel.selection.data.calibration import read_samples
from axolotl_layersel.selection.methods.cka import measure_token_states
from axolotl_layersel.selection.methods.gradient import Sketches
from axolotl_layersel.training.prepare import prepare_trainer

LAYERS = 6
BLOCKS = {
    "last": selection("last", ratio=0.5),
    "explicit": selection("explicit", layers=[1, 4]),
    "freeze": selection("last", ratio=0.5, unselected="freeze"),
    "l1ra": l1ra(max_rank=6),
    "both": {"layersel": {**selection("last", num_layers=2)["layersel"], **l1ra()["layersel"]}},
}


def prepare(folder, block: dict, use_rslora: bool = False, **arguments):
    """Return a prepared trainer of a real model."""
    model = make_lora(make_small_llama(LAYERS), task_type="CAUSAL_LM", use_rslora=use_rslora)  # as Axolotl says
    trainer = make_trainer(model, folder, **{"max_steps": 12, **arguments})
    prepare_trainer(trainer, LayerselConfig(**block["layersel"]))
    return trainer


def list_trained(trainer) -> list[torch.nn.Parameter]:
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("name", BLOCKS)
def test_parameters_are_those_of_the_real_model(tmp_path, name):
    case = make_case(make_small_llama(LAYERS), **BLOCKS[name])
    plain = make_lora(make_small_llama(LAYERS))
    assert collect(layers.describe_parameters(case, case.model))["plain"] == plain.get_nb_trainable_parameters()[0]
    trained = list_trained(prepare(tmp_path, BLOCKS[name]))
    assert layers.count_room(case, case.model) == sum(parameter.numel() for parameter in trained)
    assert sorted(memory.list_trained_sizes(case, case.model)) == sorted(each.numel() for each in trained)


@pytest.mark.parametrize("method", ["cka", "random"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_a_choice_by_score_trains_as_many_parameters_whichever_layers_it_keeps(tmp_path, method, ratio):
    block = selection(method, ratio=ratio)
    case = make_case(make_small_llama(LAYERS), **block)
    trained = list_trained(prepare(tmp_path, block))
    chosen = collect(layers.describe_parameters(case, case.model))["chosen"]
    assert chosen["least"] == chosen["most"] == sum(parameter.numel() for parameter in trained)


def count_state(state) -> int:
    """Return the bytes of an optimizer's state, without tables of numbers that all weights share."""
    return sum(
        value.nbytes
        for each in state.values()
        for key, value in each.items()
        if torch.is_tensor(value) and not key.startswith("qmap")
    )


@pytest.mark.parametrize("name", ["last", "l1ra"])
def test_memory_of_weights_and_adams_state_is_that_of_a_real_step(tmp_path, name):
    case = make_case(make_small_llama(LAYERS), **BLOCKS[name])
    trainer = prepare(tmp_path, BLOCKS[name])
    trained = list_trained(trainer)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    told = collect(memory.describe_memory(case, case.model))
    base = sum(each.nbytes for key, each in trainer.model.named_parameters() if ".lora_" not in key)
    assert told["weights"] == base
    assert told["lora"] == sum(each.nbytes for each in trained)
    assert told["gradients"] == sum(each.grad.nbytes for each in trained)
    assert told["optimizer"] == count_state(optimizer.state)


def test_moments_of_8_bits_have_the_bytes_of_a_real_step():
    weights = [torch.nn.Parameter(torch.randn(size)) for size in (64, 4096, 10_000)]
    optimizer = AdamW8bit(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert memory.count_optimizer("adamw_bnb_8bit", [64, 4096, 10_000]) == count_state(optimizer.state)


def test_a_base_of_4_bits_has_the_bytes_of_real_quantisation():
    base = make_small_llama(2, hidden_size=256, intermediate_size=512)
    case = make_case(base, **selection("last"), adapter="qlora", load_in_4bit=True, bf16=True)
    total = 0
    for name, parameter in base.named_parameters():
        if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name:
            packed, state = quantize_4bit(parameter.detach(), quant_type="nf4", compress_statistics=True)
            total += packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        else:
            total += 2 * parameter.numel()
    assert collect(memory.describe_memory(case, case.model))["weights"] == total


def test_a_process_of_several_holds_its_part(tmp_path):
    base = make_small_llama(LAYERS)
    one = collect(memory.describe_memory(case := make_case(base, **BLOCKS["last"]), case.model))
    sharded = {"fsdp_version": 2, "fsdp_config": {"offload_params": False}}
    split = make_case(base, processes=2, **BLOCKS["last"], **sharded)
    assert collect(memory.describe_memory(split, split.model)) == {key: value // 2 for key, value in one.items()}


def test_gates_have_the_bytes_of_the_real_ones(tmp_path):
    trainer = prepare(tmp_path, BLOCKS["l1ra"])
    (ranks,) = (each.ranks for each in trainer.callback_handler.callbacks if isinstance(each, RankCallback))
    held = [*ranks.components.list_tensors().values(), ranks.gates.gradient]
    case = make_case(make_small_llama(LAYERS), **BLOCKS["l1ra"])
    assert collect(memory.describe_memory(case, case.model))["gates"] == sum(tensor.nbytes for tensor in held)


def test_sketches_have_the_bytes_of_the_real_ones(tmp_path):
    trainer = make_trainer(make_lora(make_small_llama(LAYERS)), tmp_path)
    made = make_selection(trainer, "gradient", num_samples=4)
    modules = [made.run.lora_modules[name] for name in made.stack.list_modules(made.candidates)]
    width = made.highest_rank + memory.OVERSAMPLING
    recorder = Sketches(modules, width, 3, range(4), torch.device("cpu"))
    held = [*recorder.values, *recorder.drawn.values()]
    case = make_case(make_small_llama(LAYERS), **selection("gradient"))
    told = collect(memory.describe_pass(case, case.model))
    assert told["sketches"] == sum(tensor.nbytes for tensor in held)


def test_hidden_states_of_cka_have_the_bytes_of_the_real_ones(tmp_path):
    trainer = make_trainer(make_lora(make_small_llama(LAYERS)), tmp_path)
    made = make_selection(trainer, "cka", num_samples=5)
    samples = read_samples(trainer.train_dataset, 5, 3)
    states = measure_token_states(made, samples, None)
    case = make_case(make_small_llama(LAYERS), **selection("cka", num_samples=5))
    assert collect(memory.describe_pass(case, case.model))["states"] == states.nbytes
    assert collect(rows.describe_rows(case))["rows"] == len(states)


TOKENS, BATCH = 64, 2


def count_operations(lowest: int, checkpointing: str, cut: bool) -> int:
    """Return the operations of matrix products in a training step of a real model, by PyTorch's counter."""
    settings = {"hidden_size": 64, "intermediate_size": 128, "attn_implementation": "eager"}
    targets = r".*\.({})\..*_proj".format("|".join(map(str, range(lowest, LAYERS))))
    model = make_lora(make_small_llama(LAYERS, **settings), targets)
    model.enable_input_require_grads()  # as Axolotl does
    if CHECKPOINTING[checkpointing]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING[checkpointing])
    model.train()
    if cut:
        TruncatedBackward(model, find_layer_stack(model)).install()
    ids = torch.randint(3, 97, (BATCH, TOKENS))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("lowest", [0, 3, 5])
def test_the_time_of_a_step_follows_counted_operations(lowest, checkpointing):
    base = make_small_llama(LAYERS, hidden_size=64, intermediate_size=128)
    kind = CHECKPOINTING[checkpointing]
    keys = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kind} if kind else {}
    case = make_case(
        base, lowest=lowest, **selection("cka"), lora_target_modules=r".*_proj", sequence_len=TOKENS, **keys
    )
    told = collect(time.describe_time(case, case.model))[f"lowest_{lowest}"]
    plain = count_operations(0, checkpointing, cut=False)
    assert told == pytest.approx(count_operations(lowest, checkpointing, cut=lowest > 0) / plain, rel=0.02)
    work = count_work(case.model.base, case.model.stack, case.model.sizes, TOKENS)
    counted = count_step(work, 0, set(range(LAYERS)), bool(kind), cuts=False) * TOKENS * BATCH
    assert counted == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_step_of_plain_lora_in_the_upper_layers_goes_down_to_the_embeddings_too(checkpointing):
    kind = CHECKPOINTING[checkpointing]
    keys = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kind} if kind else {}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    keys |= {"lora_target_modules": targets, "peft_layers_to_transform": [3, 4, 5], "sequence_len": TOKENS}
    base = make_small_llama(LAYERS, hidden_size=64, intermediate_size=128)
    case = make_case(base, lowest=3, **selection("cka"), **keys)
    told = collect(time.describe_time(case, case.model))["lowest_3"]
    with set_checkpoint_early_stop(False):  # it leaves out the last product of a layer without LoRA
        cut, plain = (count_operations(3, checkpointing, cut=cut) for cut in (True, False))
    assert told == pytest.approx(cut / plain, rel=0.02)


@contextlib.contextmanager
def counting_calls(monkeypatch):
    """Count the calls of ``torch.distributed`` in a group of one process within the block."""
    calls: list[str] = []
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    def counted(name: str):
        function = getattr(torch.distributed, name)

        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    try:
        with monkeypatch.context() as patch:
            for name in ("broadcast", "all_reduce", "all_gather_object", "broadcast_object_list", "gather_object"):
                patch.setattr(torch.distributed, name, counted(name))
            yield calls
    finally:
        torch.distributed.destroy_process_group()


def test_an_update_of_rank_makes_as_many_calls_as_a_real_one(tmp_path, monkeypatch):
    trainer = prepare(tmp_path, BLOCKS["l1ra"])
    (ranks,) = (each.ranks for each in trainer.callback_handler.callbacks if isinstance(each, RankCallback))
    trainer.create_optimizer()
    ranks.start(20)
    with counting_calls(monkeypatch) as calls:
        ranks.update(min(ranks.update_steps))
    case = make_case(make_small_llama(LAYERS), processes=2, **BLOCKS["l1ra"])
    assert collect(communication.describe_collectives(case, case.model))["update"] == len(calls)


@pytest.mark.trains
@pytest.mark.parametrize("name", ["last", "freeze", "both"])
def test_checkpoints_take_the_bytes_and_have_the_readers_of_real_ones(tmp_path, name):
    trainer = prepare(tmp_path, BLOCKS[name], save_strategy="steps", save_steps=12)
    trainer.train()
    case = make_case(make_small_llama(LAYERS), **BLOCKS[name])
    told, checkpoint = collect(disk.describe_disk(case, case.model)), tmp_path / "checkpoint-12"
    file = read_adapter_file(checkpoint, LAYERS)
    tensors = 4 * sum(file.sizes.values())
    moved = name == "both"  # its adapter holds the rank in use
    assert told["adapter"] == tensors or (moved and tensors <= told["adapter"])
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    ranks = told.get("ranks", 0)
    assert told["checkpoint"] == told["adapter"] + ranks + count_state(state)
    if moved:
        (path,) = (checkpoint / "layersel").glob("*.safetensors")
        assert ranks == pytest.approx(path.stat().st_size, rel=0.2) and ranks < path.stat().st_size
    paths = case.model.stack.paths
    right, expected = find_readers(file, paths).right, collect(serving.describe_serving(case, case.model))["right"]
    # Ranks that happen not to differ have more readers.
    assert expected == right or (moved and set(expected) < set(right))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_readers_are_those_of_an_adapter_whose_scaling_follows_the_rank(tmp_path, exponent):
    ranked = selection("fisher", granularity="module", rank_allocation="score", num_samples=8, min_rank=1, max_rank=6)
    block = {"layersel": {**ranked["layersel"], "scaling_exponent": exponent}}
    trainer = prepare(tmp_path, block)
    trainer.save_model()
    case = make_case(make_small_llama(LAYERS), **block)
    paths, told = case.model.stack.paths, collect(serving.describe_serving(case, case.model))
    readers = find_readers(read_adapter_file(tmp_path, LAYERS), paths)
    assert (told["right"], told["export_for"]) == (readers.right, readers.export_for)
    assert ("vLLM" in readers.right, "llama.cpp" in readers.right) == (exponent == 0, exponent == 1)


SCORED = {"granularity": "module", "rank_allocation": "score", "num_samples": 8, "min_rank": 1, "max_rank": 6}
EVEN = {"rank_allocation": "match", "num_layers": 3}  # twice the rank in half of the layers
UNEVEN = {"rank_allocation": "match", "num_layers": 5}
RANKED = {
    "score": selection("fisher", **SCORED),
    "even": selection("last", **EVEN),
    "uneven": selection("last", **UNEVEN),
    "even by a bound": selection("last", **UNEVEN, max_rank=4),
    "with frozen modules": selection("last", **EVEN, unselected="freeze"),
    "modules of different sizes": selection("random", granularity="module", ratio=0.4, rank_allocation="match"),
}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", RANKED)
def test_readers_are_those_of_an_adapter_with_the_ranks_of_a_choice(tmp_path, name, use_rslora):
    trainer = prepare(tmp_path, RANKED[name], use_rslora)
    trainer.save_model()
    case = make_case(make_small_llama(LAYERS), **RANKED[name], peft_use_rslora=use_rslora)
    readers = find_readers(read_adapter_file(tmp_path, LAYERS), case.model.stack.paths)
    told = collect(serving.describe_serving(case, case.model))
    assert (told["right"], told.get("export_for")) == (readers.right, readers.export_for)
    assert ("llama.cpp" in readers.right) == name.startswith("even")


def test_the_readers_of_an_adapter_with_the_ranks_of_a_plan_are_left_open():
    case = make_case(make_small_llama(LAYERS), **selection("last", plan="plan.json"))
    (fact,) = serving.describe_serving(case, case.model)
    assert (fact.value, fact.text[:23]) == (None, "The ranks of the plan d")


def test_targets_are_those_of_the_real_adapter(tmp_path):
    case = make_case(make_small_llama(LAYERS), **BLOCKS["last"])
    assert {name.rpartition(".")[2] for name in case.model.sizes} == set(TARGETS)
    assert make_rows(1)[0].keys() == {"input_ids", "attention_mask", "labels"}
