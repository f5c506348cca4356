"""Small random models with an encoder and a decoder of unequal depths, and rows for them."""

import copy
import functools

import torch
import transformers
from conftest import make_lora

T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
    "init_std": 0.1,
}
PLACES = {
    "T5": {"encoder": "encoder.block", "decoder": "decoder.block"},
    "Bart": {"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"},
}
NAMES = {
    "T5": ["encoder.0", "encoder.1", "encoder.2", "decoder.0", "decoder.1"],
    "Bart": ["encoder.0", "encoder.1", "decoder.0", "decoder.1", "decoder.2"],
}
# By the names of transformers' classes: the settings, and the modules that get LoRA.
ARCHITECTURES = {"T5": (T5, ["q", "v"]), "Bart": (BART, ["q_proj", "v_proj"])}
# Others of the same two kinds.
RELATED = {
    "MT5": (T5, ["q", "v"]),
    "Marian": (BART, ["q_proj", "v_proj"]),
    "Pegasus": (BART, ["q_proj", "v_proj"]),
    "MBart": (BART, ["q_proj", "v_proj"]),
}
CLASSES = {"Marian": "MarianMTModel"}


@functools.cache
def make_base(name: str):
    settings, _ = {**ARCHITECTURES, **RELATED}[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=97, **settings)
    model = getattr(transformers, CLASSES.get(name, f"{name}ForConditionalGeneration"))(config)
    if settings is T5:
        # Its own are so small that layers hardly differ.
        for key, parameter in model.named_parameters():
            if parameter.dim() == 2 and "shared" not in key and "embed" not in key:
                torch.nn.init.normal_(parameter, std=0.15)
    return model


def make_encoder_decoder(name: str):
    """Return a new model without LoRA, the same each time."""
    return copy.deepcopy(make_base(name))


def make_lora_encoder_decoder(name: str):
    """Return it under LoRA as PEFT puts it on such models."""
    _, targets = {**ARCHITECTURES, **RELATED}[name]
    return make_lora(make_encoder_decoder(name), targets, task_type="SEQ_2_SEQ_LM")


def make_pairs(count: int = 13) -> list[dict]:
    """Return rows whose inputs and answers have other lengths, and all end in the token 1."""
    generator, rows = torch.Generator().manual_seed(1), []
    for _ in range(count):
        lengths = torch.randint(3, 14, (2,), generator=generator).tolist()
        ids, labels = ([*torch.randint(3, 97, (n,), generator=generator).tolist(), 1] for n in lengths)
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows
