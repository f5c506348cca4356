"""Files that cannot be honoured, each with the beginning or a part of the sentence that refuses it."""

from axolotl_layersel.config.root import LayerselArgs
from axolotl_layersel.config.textual import check_text
from helpers.settings import l1ra, pressure, selection

FILE = {
    "base_model": "base",
    "plugins": ["axolotl_layersel.LayerSelectionPlugin"],
    "output_dir": "output",
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
    "max_steps": 6,
    "optimizer": "adamw_torch",
    **selection(ratio=0.5),
}


def flexora(**values) -> dict:
    """Return a ``layersel`` block that searches."""
    return selection("flexora", flexora=values)


EXPERTS = {"lora_target_parameters": ["mlp.experts.gate_up_proj"]}
CASES = {
    "no block": ({"layersel": None}, "layersel: the plugin is listed but its block is missing or empty"),
    "misspelt block": (
        {"layersel": None, "layersell": {"selection": {"method": "cka"}}},
        "layersell is not a setting, and the file has no `layersel` block. Rename the key to `layersel`.",
    ),
    "empty block": ({"layersel": {}}, "layersel: the block is empty, so it would do nothing. Add `selection`"),
    "block of another type": ({"layersel": [1]}, "layersel: [1] is not a mapping"),
    "exponent above 1": (
        {"layersel": {"l1ra": {}, "scaling_exponent": 1.5}},
        "layersel.scaling_exponent: 1.5 is outside [0, 1]. Set a value in this range, such as 0.5.",
    ),
    "exponent in words": (
        {"layersel": {"l1ra": {}, "scaling_exponent": "half"}},
        "layersel.scaling_exponent: 'half' is not a finite number. Write a finite number, or remove the key.",
    ),
    "exponent with one rank": (
        {"layersel": {**selection(ratio=0.5)["layersel"], "scaling_exponent": 0.5}},
        "layersel.scaling_exponent: 0.5 has no effect with rank_allocation: same, the default of method: cka, "
        "which changes no rank. Set `rank_allocation: match`, add `l1ra`, or remove the key.",
    ),
    "no adapter": ({"adapter": None}, "adapter: None has no LoRA layers to choose from"),
    "relora": ({"relora": True, "jagged_restart_steps": 2}, "relora: True merges and restarts the adapter"),
    "ratio of zero": (selection(ratio=0), "layersel.selection.ratio: 0.0 is outside (0, 1]"),
    "ratio above one": (selection(ratio=1.5), "layersel.selection.ratio: 1.5 is outside (0, 1]"),
    "two sizes": (
        selection(ratio=0.5, num_layers=3),
        "layersel.selection: ratio: 0.5 and num_layers: 3 all set how many are chosen. Keep only one of these keys.",
    ),
    "no layer": (selection(num_layers=0), "layersel.selection.num_layers: 0 is too low. Set 1 or more."),
    "explicit without layers": (selection(method="explicit"), "layersel.selection.layers is missing"),
    "repeated layers": (
        selection(method="explicit", layers=[1, 2, 1]),
        "layersel.selection.layers: [1] are listed more than once",
    ),
    "negative layers": (selection(method="explicit", layers=[-1]), "layersel.selection.layers: [-1] are negative"),
    "layers without explicit": (selection(layers=[1]), "layersel.selection.layers: [1] has no effect with method: cka"),
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
        "num_samples: 2 is too few rows for method: cka. Set 3",
    ),
    "a seed that NumPy does not take": ({"seed": 2**32}, "seed: 4294967296 is outside 0 to 4294967295"),
    "a list for a mapping": ({"fsdp_config": [1]}, "fsdp_config: [1] is not a mapping. Write its keys on lines"),
    "gates without a search": (
        selection(method="random", keep="positive"),
        "layersel.selection.keep: positive needs gates, but method: random has none.",
    ),
    "contradicting layers_to_transform": (
        {"peft_layers_to_transform": [0, 1], **selection(method="explicit", layers=[1, 3])},
        "peft_layers_to_transform: [0, 1] contradicts layersel.selection.layers: layers [3] would have no LoRA",
    ),
    "too small layers_to_transform": (
        {"peft_layers_to_transform": [0, 1], **selection(num_layers=3)},
        "peft_layers_to_transform: [0, 1] contradicts layersel.selection.num_layers: 3",
    ),
    "context parallelism": (
        {"context_parallel_size": 2},
        "context_parallel_size: 2 splits rows across devices, which the plugin is untested with",
    ),
    "sequence parallelism": (
        {"sequence_parallel_degree": 2},
        "sequence_parallel_degree: 2 splits rows across devices, which the plugin is untested with",
    ),
    "tensor parallelism": (
        {"tensor_parallel_size": 2},
        "tensor_parallel_size: 2 splits LoRA's matrices across devices, but only one device's part is saved",
    ),
    "expert parallelism": (
        {"expert_parallel_size": 2},
        "expert_parallel_size: 2 splits experts across devices, which the plugin is untested with",
    ),
    "first FSDP": (
        {"fsdp_version": 1, "fsdp_config": {"offload_params": False}},
        "fsdp_version: 1 is not supported by the plugin. Set `fsdp_version: 2`.",
    ),
    "experts not in a list": (
        {"lora_target_parameters": "mlp.experts.gate_up_proj"},
        "lora_target_parameters: 'mlp.experts.gate_up_proj' is one name, but PEFT expects a list",
    ),
    "orthogonal experts": (
        {**EXPERTS, "peft_init_lora_weights": "orthogonal"},
        "peft_init_lora_weights: 'orthogonal' cannot be combined with lora_target_parameters",
    ),
    "experts on ZeRO-3": (
        {**EXPERTS, "deepspeed": {"zero_optimization": {"stage": 3}}},
        "lora_target_parameters: PEFT cannot put LoRA on expert parameters under ZeRO-3",
    ),
    "streaming": ({"streaming": True}, "streaming: True cannot be sampled for layersel.selection.method: 'cka'"),
    "prompts without answers": (
        {"rl": "grpo", **selection(method="cka")},
        "rl: 'grpo' trains on prompts whose answers are not generated yet, but layersel.selection.method: 'cka'",
    ),
    "pairs without labels": (
        {"reward_model": True, **selection(method="fisher")},
        "has no labels, but layersel.selection.method: 'fisher' needs the likelihood of labels. Use `cka` or `cosine`.",
    ),
    "l1ra: unknown key": (l1ra(max_rnk=3), "layersel.l1ra.max_rnk is not a setting: did you mean 'max_rank'?"),
    "l1ra: no mapping": ({"layersel": {"l1ra": True}}, "layersel.l1ra: True is not a mapping"),
    "l1ra: no room": (
        l1ra(max_rank=3),
        "layersel.l1ra.max_rank: 3 is less than lora_r: 4, the rank that modules start",
    ),
    "l1ra: endless rank": (l1ra(max_rank=float("inf")), "layersel.l1ra.max_rank: inf is not a whole number."),
    "l1ra: floor above the start": (l1ra(min_rank=5), "layersel.l1ra.min_rank: 5 is more than lora_r: 4"),
    "l1ra: no floor": (l1ra(min_rank=0), "layersel.l1ra.min_rank: 0 is outside 1 to 65536. Set a value in this range."),
    "l1ra: negative lambda": (
        l1ra(l1_lambda=-0.1),
        "layersel.l1ra.l1_lambda: -0.1 is neither `auto` nor a number of 0",
    ),
    "l1ra: misspelt lambda": (l1ra(l1_lambda="atuo"), "layersel.l1ra.l1_lambda: 'atuo' is neither `auto` nor a number"),
    "l1ra: negative learning rate": (
        l1ra(gate_lr=-0.1),
        "layersel.l1ra.gate_lr: -0.1 is too low. Set 0 or more, such as 0.02.",
    ),
    "l1ra: auto without a learning rate": (
        pressure(gate_lr=0),
        "layersel.l1ra.gate_lr: 0 holds the gates constant",
    ),
    "l1ra: pressure without a learning rate": (
        pressure(gate_lr=0, l1_lambda=0.5),
        "layersel.l1ra.gate_lr: 0 holds the gates constant, so l1_lambda: 0.5 has no effect",
    ),
    "l1ra: no threshold": (l1ra(prune_threshold=0), "layersel.l1ra.prune_threshold: 0.0 is outside (0, 1)"),
    "l1ra: another rule's key": (
        l1ra(l1_lambda=0.5),
        "layersel.l1ra.l1_lambda: 0.5 has no effect with the default, rule: saliency. Set `rule: pressure`",
    ),
    "l1ra: share of no rank": (l1ra(move_ratio=0), "layersel.l1ra.move_ratio: 0.0 is outside (0, 1]"),
    "l1ra: ends before it begins": (
        l1ra(warmup_ratio=0.6, last_update_ratio=0.5),
        "layersel.l1ra.last_update_ratio: 0.5 is not after warmup_ratio: 0.6",
    ),
    "l1ra: unknown rule": (
        l1ra(rule="presure"),
        "layersel.l1ra.rule: 'presure' is not known: did you mean 'pressure'?",
    ),
    "l1ra: floor as text": (l1ra(min_rank="5"), "layersel.l1ra.min_rank: 5 is more than lora_r: 4"),
    "l1ra: blank": (
        {"layersel": {**selection()["layersel"], "l1ra": None}},
        "layersel.l1ra: the block is blank",
    ),
    "two kinds of checkpointing": (
        {
            "fsdp_version": 2,
            "fsdp_config": {"activation_checkpointing": True},
            "gradient_checkpointing": True,
        },
        "fsdp_config.activation_checkpointing: True and gradient_checkpointing: True ask for the same thing. Remove",
    ),
    "l1ra: vLLM generates": (
        {**l1ra(), "rl": "grpo", "trl": {"use_vllm": True}},
        "trl.use_vllm: true sends the adapter to vLLM while it trains",
    ),
    "l1ra: hidden states beside": ({**l1ra(), "rl": "ebft"}, "rl: 'ebft' also reads hidden states of the model"),
    "l1ra: no interval": (l1ra(update_ratio=0), "layersel.l1ra.update_ratio: 0.0 is outside (0, 1]"),
    "l1ra: two updates in no run": (
        l1ra(update_ratio=0.4),
        "layersel.l1ra.update_ratio: 0.4 leaves fewer than two updates in a run of any length",
    ),
    "l1ra: a run known to be too short": (
        {**l1ra(), "max_steps": 2},
        "leaves 1 rank updates in a run of max_steps: 2 optimizer steps, but rank needs two or more to move.",
    ),
    "l1ra: no rank to move": (
        {**l1ra(), "lora_r": 1},
        "lora_r: modules start with rank 1, and layersel.l1ra.min_rank: 1 is the rank that each of them keeps",
    ),
    "gradient: equal ranks": (
        selection("gradient", max_rank=4),
        "layersel.selection.budget: it allows rank 4 in every unit, which is not below max_rank: 4",
    ),
    "time in per cent": (
        selection("gradient", time=60),
        "layersel.selection.time: 60 is outside (0, 1): it is a share of the time of plain LoRA's step. Set 0.6 for",
    ),
    "time of zero": (selection("gradient", time=0), "selection.time: 0.0 is outside (0, 1). Set a value in this range"),
    "time of all": (
        selection("gradient", time=1),
        "layersel.selection.time: 1 allows a step as long as plain LoRA's. Remove the key, or set a value below 1",
    ),
    "time without gains": (
        selection("cka", time=0.75),
        "layersel.selection.time: 0.75 weighs the gains of rank against time, and method: cka measures no gains. Set",
    ),
    "time and ratio": (
        selection("gradient", time=0.75, ratio=0.5),
        "layersel.selection.time: 0.75 decides from which layer upwards LoRA trains, and ratio: 0.5 limits the same",
    ),
    "time and layers by number": (
        selection("gradient", time=0.75, granularity="layer", num_layers=3),
        "from which layer upwards LoRA trains, and num_layers: 3 limits the same choice. Keep only one of these keys.",
    ),
    "time and units by number": (
        selection("gradient", time=0.75, num_units=3),
        "from which layer upwards LoRA trains, and num_units: 3 limits the same choice.",
    ),
    "time and candidates": (
        selection("gradient", time=0.75, candidates=[1, 2]),
        "from which layer upwards LoRA trains, and candidates: [1, 2] limits the same choice.",
    ),
    "time and equal ranks": (
        selection("gradient", time=0.75, rank_allocation="match"),
        "compares layers by the gains of their ranks, and rank_allocation: match does not read the gains. Remove one",
    ),
    "time in a vision tower": (
        selection("gradient", time=0.75, stacks="both"),
        "layersel.selection.time: 0.75 is a limit for the layers of a language model, and stacks: both chooses among",
    ),
    "time with trained embeddings": (
        {**selection("gradient", time=0.75), "lora_modules_to_save": ["embed_tokens", "lm_head"]},
        "layersel.selection.time: 0.75 cannot be reached while weights outside of the layers train (embed_tokens in "
        "lora_modules_to_save), because every backward pass must go down to them. Remove it from lora_modules_to_save",
    ),
    "l1ra: interval beyond the run": (l1ra(update_ratio=1.5), "layersel.l1ra.update_ratio: 1.5 is outside (0, 1]"),
    "l1ra: endless warmup": (l1ra(warmup_ratio=1), "layersel.l1ra.warmup_ratio: 1.0 is outside [0, 1)"),
    "l1ra: unknown budget": (
        l1ra(budget_unit="ranks"),
        "layersel.l1ra.budget_unit: 'ranks' is not known: did you mean 'rank'?",
    ),
    "l1ra: DoRA": ({**l1ra(), "peft_use_dora": True}, "peft_use_dora: true cannot be combined with"),
    "an initialisation of random numbers": (
        {"peft_init_lora_weights": "pissa_niter_4"},
        "peft_init_lora_weights: 'pissa_niter_4' cannot be combined with layersel.selection",
    ),
    "l1ra: PiSSA": ({**l1ra(), "peft_init_lora_weights": "pissa"}, "peft_init_lora_weights: 'pissa' is not supported"),
    "l1ra: OLoRA": ({**l1ra(), "peft_init_lora_weights": "olora"}, "peft_init_lora_weights: 'olora' is not supported"),
    "l1ra: EVA": ({**l1ra(), "peft_init_lora_weights": "eva"}, "peft_init_lora_weights: 'eva' is not supported"),
    "l1ra: LoftQ": ({**l1ra(), "peft": {"loftq_config": {"loftq_bits": 4}}}, "peft.loftq_config: LoftQ changes base"),
    "l1ra: ReLoRA": ({**l1ra(), "relora": True, "jagged_restart_steps": 2}, "relora: True merges and restarts"),
    "l1ra: fp16": ({**l1ra(), "fp16": True}, "fp16: True scales the loss, and so the gradients"),
    "l1ra: 8-bit optimizer": (
        {**l1ra(), "optimizer": "lion_8bit"},
        "optimizer: 'lion_8bit' is not supported by layersel.l1ra, which clears the Adam moments of the components "
        "that it moves, and does not know where this optimizer stores them. Use `adamw_bnb_8bit`.",
    ),
    "l1ra: paged optimizer": (
        {**l1ra(), "optimizer": "paged_adamw_8bit", "fsdp_version": 2, "fsdp_config": {"offload_params": False}},
        "optimizer: 'paged_adamw_8bit' cannot be combined with FSDP2, whose sharded weights bitsandbytes cannot "
        "update. Use `adamw_torch_8bit`.",
    ),
    "l1ra: no Adam": ({**l1ra(), "optimizer": "lion_pytorch"}, "optimizer: 'lion_pytorch' is not supported"),
    "l1ra: context parallelism": ({**l1ra(), "context_parallel_size": 2}, "context_parallel_size: 2 splits rows"),
    "l1ra: no rank to start from": ({**l1ra(), "lora_r": None}, "lora_r is missing, and layersel.l1ra needs a rank"),
    "flexora: no learning rate": (
        flexora(gate_lr=0),
        "layersel.selection.flexora.gate_lr: 0 holds all gates at 0, so they could not tell layers apart",
    ),
    "flexora: no step": (flexora(steps=0), "layersel.selection.flexora.steps: 0 is too low. Set 1 or more."),
    "flexora: more inner steps than steps": (
        flexora(steps=4, inner_steps=5),
        "layersel.selection.flexora.inner_steps: 5 is more than steps: 4, so no gate would move",
    ),
    "flexora: no eval set": (
        flexora(val_source="eval"),
        "layersel.selection.flexora.val_source: 'eval' needs an eval set, but this run has none. Set `val_set_size`",
    ),
    "flexora: unrolled on shards": (
        {**flexora(hypergradient="unrolled"), "fsdp_version": 2, "fsdp_config": {"offload_params": False}},
        "flexora.hypergradient: 'unrolled' needs whole LoRA weights on every process, but FSDP2 splits them",
    ),
    "flexora: unknown key": (flexora(step=3), "layersel.selection.flexora.step is not a setting: did you mean 'steps'"),
    "flexora: no mapping": (
        selection("flexora", flexora=True),
        "layersel.selection.flexora: True is not a mapping",
    ),
}


def check(values: dict) -> None:
    """Check a file as the commands and Axolotl's validation do."""
    content = {key: value for key, value in {**FILE, **values}.items() if value is not None}
    check_text(content, with_folder=False)
    LayerselArgs.model_validate(content)
