"""Files that cannot be honoured: real Axolotl ends with an error code and one sentence that says what to do."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
from helpers.plans import make_plan
from helpers.settings import l1ra, pressure, selection
from safetensors.torch import load_file, save_file

from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.selection.plan_file import write_plan
from axolotl_layersel.training.lock import FILE, RunLock

MODEL_LOADS = "Loading weights"


def flexora(**values) -> dict:
    """Return a ``layersel`` block that searches."""
    return selection("flexora", flexora=values)


EXPERTS = {"lora_target_parameters": ["mlp.experts.gate_up_proj"]}
BEFORE_THE_MODEL = {
    "no block": ({"layersel": None}, "layersel: the plugin is listed but its block is missing or empty"),
    "misspelt block": (
        {"layersel": None, "layersell": {"selection": {"method": "cka"}}},
        "layersell: is not a setting, and the plugin finds no `layersel` block. Rename the key to `layersel`.",
    ),
    "empty block": ({"layersel": {}}, "layersel: the block is empty, so it would do nothing. Add `selection`"),
    "block of another type": ({"layersel": [1]}, "layersel: [1] is not a mapping"),
    "no adapter": ({"adapter": None}, "adapter: None has no LoRA layers to choose from"),
    "relora": ({"relora": True, "jagged_restart_steps": 2}, "relora: True merges and restarts the adapter"),
    "ratio of zero": (selection(ratio=0), "layersel.selection.ratio: 0.0 is outside (0, 1]"),
    "ratio above one": (selection(ratio=1.5), "layersel.selection.ratio: 1.5 is outside (0, 1]"),
    "two sizes": (
        selection(ratio=0.5, num_layers=3),
        "layersel.selection: ratio: 0.5 and num_layers: 3 both say how much is kept. Keep one of them.",
    ),
    "no layer": (selection(num_layers=0), "layersel.selection.num_layers: 0 keeps no layer"),
    "explicit without layers": (selection(method="explicit"), "layersel.selection.layers is missing"),
    "repeated layers": (
        selection(method="explicit", layers=[1, 2, 1]),
        "layersel.selection.layers: [1] are listed more than once",
    ),
    "negative layers": (selection(method="explicit", layers=[-1]), "layersel.selection.layers: [-1] are negative"),
    "layers without explicit": (selection(layers=[1]), "layersel.selection.layers: [1] has no effect with method cka"),
    "unknown method": (
        selection(method="ckaa"),
        "layersel.selection.method: 'ckaa' is not known: did you mean 'cka'?",
    ),
    "unknown key": (selection(rato=0.5), "layersel.selection.rato is not a setting: did you mean 'ratio'?"),
    "unknown part": ({"layersel": {"selectoin": {}}}, "layersel.selectoin is not a setting: did you mean 'selection'?"),
    "unknown token": (selection(token="first"), "layersel.selection.token: 'first' is not known"),
    "one sample": (selection(num_samples=1), "layersel.selection.num_samples: 1 is too few"),
    "two samples for cka": (
        selection(num_samples=2),
        "num_samples: 2 is too few to compare rows by cka. Set 3",
    ),
    "a seed that NumPy does not take": ({"seed": 2**32}, "seed: 4294967296 is outside of 0 to 4294967295"),
    "a list for a mapping": ({"fsdp_config": [1]}, "fsdp_config: [1] is not a mapping. Write its keys on lines"),
    "gates without a search": (
        selection(method="random", keep="positive"),
        "layersel.selection.keep: positive asks for gates, and method random has none.",
    ),
    "missing plan": (selection(plan="nowhere/plan.json"), "layersel.selection.plan: nowhere/plan.json cannot be read"),
    "contradicting layers_to_transform": (
        {"peft_layers_to_transform": [0, 1], **selection(method="explicit", layers=[1, 3])},
        "peft_layers_to_transform: [0, 1] contradicts layersel.selection.layers: layers [3] would carry no LoRA",
    ),
    "too small layers_to_transform": (
        {"peft_layers_to_transform": [0, 1], **selection(num_layers=3)},
        "peft_layers_to_transform: [0, 1] contradicts layersel.selection.num_layers: 3",
    ),
    "context parallelism": (
        {"context_parallel_size": 2},
        "context_parallel_size: 2 splits rows over devices by attention that this plugin is untested with",
    ),
    "sequence parallelism": (
        {"sequence_parallel_degree": 2},
        "sequence_parallel_degree: 2 splits rows over devices by attention that this plugin is untested with",
    ),
    "tensor parallelism": (
        {"tensor_parallel_size": 2},
        "tensor_parallel_size: 2 splits LoRA's matrices over devices, of which one device's part alone is saved",
    ),
    "expert parallelism": (
        {"expert_parallel_size": 2},
        "expert_parallel_size: 2 splits experts over devices in a way that this plugin is untested with",
    ),
    "first FSDP": (
        {"fsdp_version": 1, "fsdp_config": {"offload_params": False}},
        "fsdp_version: 1 is not supported by the plugin. Set `fsdp_version: 2`.",
    ),
    "experts not in a list": (
        {"lora_target_parameters": "mlp.experts.gate_up_proj"},
        "lora_target_parameters: 'mlp.experts.gate_up_proj' is one name, and PEFT takes a list of them",
    ),
    "orthogonal experts": (
        {**EXPERTS, "peft_init_lora_weights": "orthogonal"},
        "peft_init_lora_weights: 'orthogonal' does not go with lora_target_parameters",
    ),
    "experts on ZeRO-3": (
        {**EXPERTS, "deepspeed": {"zero_optimization": {"stage": 3}}},
        "lora_target_parameters: PEFT cannot put LoRA on expert parameters under ZeRO-3",
    ),
    "layers out of range": (
        selection(method="explicit", layers=[1, 8]),
        "layersel.selection.layers: [8] are out of range: the model's layers are 0 to 7.",
    ),
    "candidates out of range": (
        selection(candidates=[99, 1]),
        "layersel.selection.candidates: [99] are out of range: the model's layers are 0 to 7.",
    ),
    "more layers than there are": (
        selection(num_layers=9),
        "layersel.selection.num_layers: 9 is more than the 8 layers that can be chosen. Set it to at most 8.",
    ),
    "empty selection": (selection(ratio=0.1), "layersel.selection.ratio: 0.1 of 8 layers keeps none"),
    "streaming": ({"streaming": True}, "streaming: True cannot be sampled for layersel.selection.method: 'cka'"),
    "prompts without answers": (
        {"rl": "grpo", **selection(method="cka")},
        "rl: 'grpo' trains on prompts whose answers are yet to be generated, and layersel.selection.method: 'cka'",
    ),
    "pairs without labels": (
        {"reward_model": True, **selection(method="fisher")},
        "has no labels, of which layersel.selection.method: 'fisher' needs the likelihood. Use `cka` or `cosine`.",
    ),
    "continued adapter": (
        {"lora_model_dir": "somewhere"},
        "layersel.selection.unselected: lora_model_dir continues a trained adapter",
    ),
    "continued adapter that is not loaded": (
        {"lora_model_dir": "somewhere", "rl": "dpo", **selection(unselected="freeze")},
        "lora_model_dir: somewhere is not loaded by Axolotl with rl: dpo",
    ),
    "checkpoint of another run": (
        {"resume_from_checkpoint": "elsewhere/checkpoint-4"},
        "resume_from_checkpoint: elsewhere/checkpoint-4 cannot be resumed from: there is no such folder",
    ),
    "l1ra: unknown key": (l1ra(max_rnk=3), "layersel.l1ra.max_rnk is not a setting: did you mean 'max_rank'?"),
    "l1ra: no mapping": ({"layersel": {"l1ra": True}}, "layersel.l1ra: True is not a mapping"),
    "l1ra: no room": (l1ra(max_rank=3), "layersel.l1ra.max_rank: 3 is less than lora_r: 4, with which modules start."),
    "l1ra: endless rank": (l1ra(max_rank=float("inf")), "layersel.l1ra.max_rank: inf is not a whole number."),
    "l1ra: floor above the start": (l1ra(min_rank=5), "layersel.l1ra.min_rank: 5 is more than lora_r: 4"),
    "l1ra: no floor": (l1ra(min_rank=0), "layersel.l1ra.min_rank: 0 is no rank of a module"),
    "l1ra: negative lambda": (l1ra(l1_lambda=-0.1), "layersel.l1ra.l1_lambda: -0.1 is not `auto` or a number from 0"),
    "l1ra: misspelt lambda": (l1ra(l1_lambda="atuo"), "layersel.l1ra.l1_lambda: 'atuo' is not `auto` or a number"),
    "l1ra: negative learning rate": (l1ra(gate_lr=-0.1), "layersel.l1ra.gate_lr: -0.1 is not a learning rate"),
    "l1ra: auto without a learning rate": (
        pressure(gate_lr=0),
        "layersel.l1ra.gate_lr: 0 holds the gates where they are",
    ),
    "l1ra: pressure without a learning rate": (
        pressure(gate_lr=0, l1_lambda=0.5),
        "layersel.l1ra.gate_lr: 0 holds the gates where they are, whatever l1_lambda: 0.5 is",
    ),
    "l1ra: no threshold": (l1ra(prune_threshold=0), "layersel.l1ra.prune_threshold: 0.0 is outside (0, 1)"),
    "l1ra: another rule's key": (
        l1ra(l1_lambda=0.5),
        "layersel.l1ra.l1_lambda: 0.5 has no effect with rule: saliency, the default. Set `rule: pressure`",
    ),
    "l1ra: share of no rank": (l1ra(move_ratio=0), "layersel.l1ra.move_ratio: 0.0 is outside (0, 1]"),
    "l1ra: ends before it begins": (
        l1ra(warmup_ratio=0.6, last_update_ratio=0.5),
        "layersel.l1ra.last_update_ratio: 0.5 comes before the first update, after warmup_ratio: 0.6",
    ),
    "l1ra: unknown rule": (
        l1ra(rule="presure"),
        "layersel.l1ra.rule: 'presure' is not known: did you mean 'pressure'?",
    ),
    "l1ra: floor as text": (l1ra(min_rank="5"), "layersel.l1ra.min_rank: 5 is more than lora_r: 4"),
    "l1ra: blank": (
        {"layersel": {**selection()["layersel"], "l1ra": None}},
        "layersel.l1ra: the key is there but its block is blank",
    ),
    "two kinds of checkpointing": (
        {
            "fsdp_version": 2,
            "fsdp_config": {"activation_checkpointing": True},
            "gradient_checkpointing": True,
        },
        "fsdp_config.activation_checkpointing: True and gradient_checkpointing: True ask for the same. Remove one",
    ),
    "l1ra: vLLM generates": (
        {**l1ra(), "rl": "grpo", "trl": {"use_vllm": True}},
        "trl.use_vllm: true gives the adapter to vLLM while it trains",
    ),
    "l1ra: hidden states beside": ({**l1ra(), "rl": "ebft"}, "rl: 'ebft' reads hidden states of the model beside"),
    "l1ra: no interval": (l1ra(update_ratio=0), "layersel.l1ra.update_ratio: 0.0 is outside (0, 1]"),
    "l1ra: two updates in no run": (
        l1ra(update_ratio=0.4),
        "layersel.l1ra.update_ratio: 0.4 leaves fewer than two updates in a run of any length",
    ),
    "l1ra: a run known to be too short": (
        {**l1ra(), "max_steps": 2},
        "leaves 1 rank updates in a run of max_steps: 2 optimizer steps; it takes two or more for rank to move.",
    ),
    "l1ra: no rank to move": (
        {**l1ra(), "lora_r": 1},
        "lora_r: modules start with rank 1, and layersel.l1ra.min_rank: 1 is what each of them keeps",
    ),
    "gradient: equal ranks": (
        selection("gradient", max_rank=4),
        "layersel.selection.budget: it pays for rank 4 everywhere, which is max_rank: 4 or more",
    ),
    "l1ra: interval beyond the run": (l1ra(update_ratio=1.5), "layersel.l1ra.update_ratio: 1.5 is outside (0, 1]"),
    "l1ra: endless warmup": (l1ra(warmup_ratio=1), "layersel.l1ra.warmup_ratio: 1.0 is outside [0, 1)"),
    "l1ra: unknown budget": (
        l1ra(budget="ranks"),
        "layersel.l1ra.budget_unit: 'ranks' is not known: did you mean 'rank'?",
    ),
    "l1ra: DoRA": ({**l1ra(), "peft_use_dora": True}, "peft_use_dora: true. DoRA ties its magnitudes"),
    "an initialisation of random numbers": (
        {"peft_init_lora_weights": "pissa_niter_4"},
        "peft_init_lora_weights: 'pissa_niter_4' does not go with layersel.selection",
    ),
    "PiSSA on rounded weights": (
        {"peft_init_lora_weights": "pissa", "bf16": True},
        "peft_init_lora_weights: 'pissa' with `unselected: remove` needs base weights in float32, to give them back "
        "exactly what it takes out of them, and they are in bfloat16.",
    ),
    "l1ra: PiSSA": ({**l1ra(), "peft_init_lora_weights": "pissa"}, "peft_init_lora_weights: 'pissa' is not supported"),
    "l1ra: OLoRA": ({**l1ra(), "peft_init_lora_weights": "olora"}, "peft_init_lora_weights: 'olora' is not supported"),
    "l1ra: EVA": ({**l1ra(), "peft_init_lora_weights": "eva"}, "peft_init_lora_weights: 'eva' is not supported"),
    "l1ra: LoftQ": ({**l1ra(), "peft": {"loftq_config": {"loftq_bits": 4}}}, "peft.loftq_config: LoftQ changes the"),
    "l1ra: ReLoRA": ({**l1ra(), "relora": True, "jagged_restart_steps": 2}, "relora: True merges and restarts"),
    "l1ra: fp16": ({**l1ra(), "fp16": True}, "fp16: True scales the loss, and with it the gradients"),
    "l1ra: 8-bit optimizer": (
        {**l1ra(), "optimizer": "lion_8bit"},
        "optimizer: 'lion_8bit' is not supported by layersel.l1ra, which clears the Adam moments of the components "
        "that it moves, and does not know where this one keeps them. Use `adamw_bnb_8bit`.",
    ),
    "l1ra: paged optimizer": (
        {**l1ra(), "optimizer": "paged_adamw_8bit", "fsdp_version": 2, "fsdp_config": {"offload_params": False}},
        "optimizer: 'paged_adamw_8bit' does not go with FSDP2, on whose weights bitsandbytes cannot compute. "
        "Use `adamw_torch_8bit`.",
    ),
    "l1ra: no Adam": ({**l1ra(), "optimizer": "lion_pytorch"}, "optimizer: 'lion_pytorch' is not supported"),
    "l1ra: context parallelism": ({**l1ra(), "context_parallel_size": 2}, "context_parallel_size: 2 splits rows"),
    "l1ra: no rank to start from": ({**l1ra(), "lora_r": None}, "lora_r: None is no rank that layersel.l1ra could"),
    "l1ra: checkpoint of another run": (
        {**l1ra(), "resume_from_checkpoint": "elsewhere/checkpoint-4"},
        "resume_from_checkpoint: elsewhere/checkpoint-4 cannot be resumed from: there is no such folder",
    ),
    "flexora: no learning rate": (
        flexora(gate_lr=0),
        "layersel.selection.flexora.gate_lr: 0 holds all gates at 0, so there would be nothing to choose by",
    ),
    "flexora: no step": (flexora(steps=0), "layersel.selection.flexora.steps: 0 is too few. Set 1 or more."),
    "flexora: more inner steps than steps": (
        flexora(steps=4, inner_steps=5),
        "layersel.selection.flexora.inner_steps: 5 is more than steps: 4, so no gate would ever move",
    ),
    "flexora: no eval set": (
        flexora(val_source="eval"),
        "layersel.selection.flexora.val_source: 'eval' needs an eval set, and this run has none. Set `val_set_size`",
    ),
    "flexora: unrolled on shards": (
        {**flexora(hypergradient="unrolled"), "fsdp_version": 2, "fsdp_config": {"offload_params": False}},
        "flexora.hypergradient: 'unrolled' needs the LoRA weights whole on every process, and FSDP2 splits them",
    ),
    "flexora: unknown key": (flexora(step=3), "layersel.selection.flexora.step is not a setting: did you mean 'steps'"),
    "flexora: no mapping": (
        selection("flexora", flexora=True),
        "layersel.selection.flexora: True is not a mapping",
    ),
}
AFTER_THE_MODEL = {
    "flexora: no training rows left": (
        flexora(val_samples=63),
        "layersel.selection.flexora.val_samples: 63 of the 64 training rows leaves 1 to train on, and the search needs "
        "2 or more. Set it to 21, which leaves most of them to train on, or use `val_source: eval`.",
    ),
    "l1ra: a run too short": (
        {**l1ra(update_ratio=0.33), "max_steps": None},
        "layersel.l1ra.update_ratio: 0.33 (warmup_ratio: 0.0) leaves 1 rank updates in a run of 32 optimizer steps",
    ),
    "l1ra: embeddings": (
        {**l1ra(), "lora_target_modules": ["q_proj", "embed_tokens"]},
        "lora_target_modules: model.embed_tokens is a Embedding, whose LoRA layersel.l1ra does not support",
    ),
    "l1ra: a rank above the room": (
        {**l1ra(max_rank=6), "lora_rank_pattern": {"q_proj": 7}},
        "layersel.l1ra.max_rank: 6 is less than the rank 7 that model.layers.0.self_attn.q_proj has",
    ),
    "no stack": ({"lora_target_modules": ["lm_head"]}, "lora_target_modules: no stack of layers that carries LoRA"),
    "few samples": (selection(num_samples=128), "layersel.selection.num_samples: 128 is more than the 64 rows"),
    "fewer layers with LoRA": (
        {"lora_target_modules": r".*\.[0-3]\.self_attn\.q_proj", **selection("last", num_layers=5)},
        "layersel.selection.num_layers: 5 is more than the 4 layers that can be chosen. Set it to at most 4.",
    ),
}


@pytest.fixture(scope="module")
def refused(request, train):
    """The runs of the cases that are asked for, two at a time, for each is one process's work."""
    cases = {**BEFORE_THE_MODEL, **AFTER_THE_MODEL}
    asked = [item.callspec.params["case"] for item in request.session.items if "refused" in item.fixturenames]
    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(train, expect=1, **cases[case][0]) for case in asked}


@pytest.mark.parametrize("case", BEFORE_THE_MODEL)
def test_a_file_that_cannot_be_honoured_ends_before_the_model_loads(refused, case):
    run, (_, message) = refused[case].result(), BEFORE_THE_MODEL[case]
    assert message in run.log
    assert MODEL_LOADS not in run.log


@pytest.mark.parametrize("case", AFTER_THE_MODEL)
def test_what_only_the_model_shows_ends_before_training(refused, case):
    run, (_, message) = refused[case].result(), AFTER_THE_MODEL[case]
    assert message in run.log
    assert "Starting trainer" not in run.log
    assert not (run.folder / "layersel").exists()
    assert not (run.folder / FILE).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema_version": 3, "lay', "is not valid JSON, truncated or damaged"),
        (json.dumps({"schema_version": 2}), "has schema_version 2, and this version of axolotl-layersel reads 3"),
    ],
)
def test_a_damaged_plan_ends_before_the_model_loads(train, tmp_path, content, message):
    (tmp_path / "plan.json").write_text(content)
    run = train(expect=1, **selection(plan=str(tmp_path / "plan.json")))
    assert message in run.log
    assert MODEL_LOADS not in run.log


def test_a_plan_of_another_model_ends_before_the_model_loads(train, tmp_path):
    settings = asdict(SelectionConfig(method="cka", num_samples=15).resolve(run_seed=1))
    other = {"base_model": "meta-llama/Llama-3.1-8B", "base_shape": {"model_type": "llama", "num_hidden_layers": 3}}
    write_plan(make_plan(settings=settings, **other), tmp_path / "plan.json")
    run = train(expect=1, **selection(plan=str(tmp_path / "plan.json"), num_samples=16))
    told = (
        "plan.json does not fit this run: (1) base_model: ",
        " is not meta-llama/Llama-3.1-8B, which it was made for; (2) base_model: ",
        " has num_hidden_layers: 8, and meta-llama/Llama-3.1-8B, which it was made for, has 3; (3) ",
        "layersel.selection.num_samples: 16 is not the 15 that it was made with. Restore what",
    )
    places = [run.log.find(part) for part in told]
    assert -1 not in places and places == sorted(places)
    assert MODEL_LOADS not in run.log


def test_a_file_in_place_of_a_folder_ends_before_the_model_loads(train, tmp_path):
    (tmp_path / "layersel").write_text("")
    run = train("ddp", expect=1, output=tmp_path)
    assert run.log.count(f"output_dir: {tmp_path / 'layersel'} is a file, where a folder is needed.") >= 2
    assert MODEL_LOADS not in run.log


def test_an_error_of_one_process_ends_all_of_them(train):
    run = train("ddp", expect=1, **selection(num_samples=128))
    assert run.log.count("layersel.selection.num_samples: 128 is more than the 64 rows of the training set") >= 2
    run = train("ddp", expect=1, **selection(plan="nowhere/plan.json"))
    assert run.log.count("LayerselError: layersel.selection.plan: nowhere/plan.json cannot be read") == 2
    assert MODEL_LOADS not in run.log


def test_a_nan_names_its_layer_and_row(train, base_model, tmp_path):
    broken = tmp_path / "base"
    broken.mkdir()
    for file in base_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run = train("ddp", expect=1, base_model=str(broken))
    assert "layersel.selection.method: NaN or infinity in layer 2 for training row" in run.log


def test_a_run_into_a_folder_that_another_run_writes_ends_all_processes_before_the_model_loads(
    train, zygote, make_config, tmp_path
):
    held = RunLock.take(tmp_path / "run")
    path, _, _ = make_config(output=tmp_path / "run")
    codes = zygote.run("axolotl_layersel.cli.worker:main", {"config": str(path)}, 1, path.with_suffix(".log"), {})
    assert codes == [1] and "is being written by another run" in (path.parent / "config.log.0").read_text()
    run = train("ddp", expect=1, output=tmp_path / "run")
    assert run.log.count("LayerselError: output_dir: ") == 2
    assert run.log.count(f"is being written by another run (process {os.getpid()} on ") >= 2
    assert MODEL_LOADS not in run.log
    held.confirm()
    held.release()
