"""Every method, and l1ra, on every kind of adapter: the rows of the table of adapters."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers.experts import make_base, make_experts
from helpers.models import make_lora, make_small_llama, make_trainer
from helpers.support import COLUMNS, L1RA, try_every_method

from axolotl_layersel.config.initialisation import REFUSED

BATCH = {"input_ids": torch.arange(3, 23)[None]}
# As wide as bitsandbytes' blocks.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
NOT_PLAIN = {column: "is not plain LoRA (DoRA, aLoRA, lora_bias or the like)" for column in ("flexora", L1RA)}
DORA = {column: "peft_use_dora: true cannot be combined with" for column in ("flexora", L1RA)}
CHANGED = {
    **{column: "whose gates need an adapter that adds nothing at the start" for column in ("flexora", L1RA)},
    "gradient": "cannot be combined with layersel.selection.rank_allocation: score",
}


def make_plain(folder: Path):
    return make_small_llama(layers=4)


def make_quantised(folder: Path, **settings):
    """Return a Llama whose weights bitsandbytes holds in fewer bits."""
    if not folder.exists():
        make_small_llama(layers=4, **WIDE).save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(**settings)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def make_4_bits(folder: Path):
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return make_quantised(folder, load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **nf4)


def make_8_bits(folder: Path):
    return make_quantised(folder, load_in_8bit=True)


# By what the user asks PEFT for: what makes the base, the settings of LoRA, and what is refused.
KINDS: dict[str, tuple[Callable, dict, dict]] = {
    "LoRA": (make_plain, {}, {}),
    "rsLoRA": (make_plain, {"use_rslora": True}, {}),
    "DoRA": (make_plain, {"use_dora": True}, DORA),
    "QLoRA (4 bits, nf4, double)": (make_4_bits, {}, {}),
    "LoRA on 8 bits": (make_8_bits, {}, {}),
    "DoRA on 4 bits": (make_4_bits, {"use_dora": True}, DORA),
    "`lora_dropout`": (make_plain, {"lora_dropout": 0.1}, {}),
    "`lora_bias`": (make_plain, {"targets": ["q_proj", "v_proj"], "lora_bias": True}, NOT_PLAIN),
    "`alora_invocation_tokens`": (make_plain, {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}, NOT_PLAIN),
    "`rank_pattern`": (make_plain, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 6}}, {}),
    "`layers_to_transform`": (make_plain, {"layers_to_transform": [0, 1, 2]}, {}),
    "`modules_to_save`": (make_plain, {"modules_to_save": ["lm_head"]}, {}),
    "`trainable_token_indices`": (make_plain, {"trainable_token_indices": [5, 6]}, {}),
    "LoRA on the embeddings too": (
        make_plain,
        {"targets": ["q_proj", "v_proj", "embed_tokens"]},
        {L1RA: "embed_tokens is a Embedding, whose LoRA layersel.l1ra does not support"},
    ),
    "`gaussian`": (make_plain, {"init_lora_weights": "gaussian"}, {}),
    "`orthogonal`": (make_plain, {"init_lora_weights": "orthogonal"}, CHANGED),
    "`pissa`": (make_plain, {"init_lora_weights": "pissa"}, CHANGED),
    "`olora`": (make_plain, {"init_lora_weights": "olora"}, CHANGED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_chooses_with_a_kind_of_adapter_and_rank_moves(kind, tmp_path, support, monkeypatch):
    # bitsandbytes 0.50 packs 4-bit weights anew on CPUs with instructions for bf16, for which these are too narrow.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    base, settings, refused = KINDS[kind]

    def make(folder, **arguments):
        return make_trainer(make_lora(base(tmp_path / "base"), **settings), folder, **arguments)

    try_every_method(support, "adapter", kind, make, lambda: base(tmp_path / "base"), tmp_path, BATCH, refused)


def test_every_method_chooses_among_experts_and_rank_moves_beside_them(tmp_path, support):
    def make(folder, **arguments):
        return make_trainer(make_experts("Mixtral", ["q_proj", "k_proj", "v_proj", "o_proj"]), folder, **arguments)

    row = "LoRA on experts (`target_parameters`)"
    try_every_method(support, "adapter", row, make, lambda: make_base("Mixtral"), tmp_path, BATCH)


@pytest.mark.parametrize("name", [name for name in REFUSED if name])
def test_an_initialisation_that_needs_what_the_run_has_not_is_refused_by_every_method(name, tmp_path, support):
    def make(folder, **arguments):
        model = make_lora(make_small_llama(layers=4))
        model.peft_config["default"].init_lora_weights = name
        return make_trainer(model, folder, **arguments)

    refused = dict.fromkeys(COLUMNS, f"peft_init_lora_weights: '{name}'")
    try_every_method(support, "adapter", f"`{name}`", make, make_small_llama, tmp_path, BATCH, refused)


OTHERS = {
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=8, target_r=4, total_step=10, target_modules=["q_proj", "v_proj"]),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_lora_is_refused_by_its_name(kind, tmp_path, support):
    def make(folder, **arguments):
        return make_trainer(peft.get_peft_model(make_small_llama(layers=4), OTHERS[kind]()), folder, **arguments)

    refused = dict.fromkeys(COLUMNS, f"adapter: {kind.upper()} is not supported. Use `adapter: lora`")
    try_every_method(support, "adapter", kind, make, make_small_llama, tmp_path, BATCH, refused)
