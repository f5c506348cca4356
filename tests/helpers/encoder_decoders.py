"""Small random models with an encoder and a decoder of different depths, and rows for them."""

import copy
import functools
from pathlib import Path

import torch
import transformers

from helpers.models import make_lora

# Without dropout, so that engines, whose random streams differ, train alike.
T5 = {
    "dropout_rate": 0.0,
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
    "dropout": 0.0,
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
# Other models of the same two kinds.
RELATED = {
    "MT5": (T5, ["q", "v"]),
    "Marian": (BART, ["q_proj", "v_proj"]),
    "Pegasus": (BART, ["q_proj", "v_proj"]),
    "MBart": (BART, ["q_proj", "v_proj"]),
}
CLASSES = {"Marian": "MarianMTModel"}


def make_t5gemma():
    """Return a model whose encoder and decoder have separate configurations."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    sides = {
        side: {**size, **tokens, "head_dim": 8, "num_hidden_layers": layers}
        for side, layers in (("encoder", 3), ("decoder", 2))
    }
    return transformers.T5GemmaForConditionalGeneration(transformers.T5GemmaConfig(**sides, **tokens))


def make_two_berts():
    """Return a model made of two BERTs, an encoder and a decoder."""
    size = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    configs = [transformers.BertConfig(num_hidden_layers=n, initializer_range=0.1, **size) for n in (3, 2)]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*configs)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    return transformers.EncoderDecoderModel(config)


def make_led():
    """Return a model whose encoder pads rows to its window."""
    lengths = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    settings = {key: value for key, value in BART.items() if key != "max_position_embeddings"}
    config = transformers.LEDConfig(vocab_size=97, attention_window=[4, 4], **lengths, **settings)
    return transformers.LEDForConditionalGeneration(config)


def make_switch():
    """Return a model with routed experts on both sides, without a loss for their load."""
    sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "router_aux_loss_coef": 0.0}
    config = transformers.SwitchTransformersConfig(vocab_size=97, num_experts=2, router_z_loss_coef=0.0, **sparse, **T5)
    return transformers.SwitchTransformersForConditionalGeneration(config)


# Models of other architectures, with the modules that get LoRA.
OTHERS = {
    "T5Gemma": (make_t5gemma, ["q_proj", "v_proj"]),
    "two Berts": (make_two_berts, ["query", "value"]),
    "LED": (make_led, ["query", "q_proj"]),
    "Switch": (make_switch, ["q", "v"]),
}


@functools.cache
def make_base(name: str):
    settings, _ = {**ARCHITECTURES, **RELATED}[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=97, **settings)
    model = getattr(transformers, CLASSES.get(name, f"{name}ForConditionalGeneration"))(config)
    if settings is T5:
        # Larger weights than the default, with which layers hardly differ.
        for key, parameter in model.named_parameters():
            if parameter.dim() == 2 and "shared" not in key and "embed" not in key:
                torch.nn.init.normal_(parameter, std=0.15)
    return model


def make_encoder_decoder(name: str):
    """Return a new model without LoRA, the same each time."""
    return copy.deepcopy(make_base(name))


def make_lora_encoder_decoder(name: str):
    """Return a model with LoRA, as PEFT puts it on such models."""
    _, targets = {**ARCHITECTURES, **RELATED}[name]
    return make_lora(make_encoder_decoder(name), targets, task_type="SEQ_2_SEQ_LM")


def make_pairs(count: int = 13, answer: int | None = None) -> list[dict]:
    """Return rows with inputs and answers of different lengths, all ending in the token 1.

    If ``answer`` is given, all answers have that many tokens, so that several processes have the loss of one.
    """
    generator, rows = torch.Generator().manual_seed(1), []
    for _ in range(count):
        lengths = torch.randint(3, 14, (2,), generator=generator).tolist()
        lengths[1] = lengths[1] if answer is None else answer - 1
        ids, labels = ([*torch.randint(3, 97, (n,), generator=generator).tolist(), 1] for n in lengths)
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def make_tokenizer():
    """Return a tokenizer whose words are numbers, each its own token."""
    import tokenizers

    model = tokenizers.models.WordLevel({str(number): number for number in range(97)}, unk_token="2")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", eos_token="1", unk_token="2")


def make_seq2seq_trainer(model, folder, rows: list[dict], **arguments):
    """Return a ``Seq2SeqTrainer`` with its collator."""
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    values = {"max_steps": 4, "learning_rate": 1e-2, "report_to": [], "seed": 3, "save_strategy": "no"}
    arguments = Seq2SeqTrainingArguments(output_dir=str(folder), **{**values, **arguments})
    tokenizer, model = make_tokenizer(), model(arguments)
    return Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model.get_base_model()),
    )


LAYER_CLASSES = {"T5": ["T5Block"], "Bart": ["BartEncoderLayer", "BartDecoderLayer"]}
CHOICES = {
    "cka": {"num_samples": 9, "num_layers": 2},
    "relative": {"num_samples": 9, "num_layers": 2},
    "fisher": {"num_samples": 9, "num_layers": 2},
    "gradient": {"num_samples": 9},
    "flexora": {"num_layers": 3, "flexora": {"steps": 2, "val_samples": 4}},
}


def run_process(name: str, engine: str, base: str, folder: str) -> None:
    """Choose with every method on an engine, train the last choice, and write the results to ``folder``."""
    import helpers.cpu_engines  # noqa: F401  # lets the engines run without a GPU
    from axolotl_layersel import LayerselConfig, SelectionConfig, prepare_trainer
    from helpers.processes import make_arguments, train_and_record

    chosen = make_arguments(engine, LAYER_CLASSES[name])
    kind = type(make_base(name))
    _, targets = ARCHITECTURES[name]

    def load(arguments):
        # From a file, because ZeRO-3 then shards it at once.
        model = make_lora(kind.from_pretrained(base, dtype=torch.float32), targets, task_type="SEQ_2_SEQ_LM")
        model.enable_input_require_grads()
        return model

    for method, settings in CHOICES.items():
        place = Path(folder) / method
        trainer = make_seq2seq_trainer(load, place, make_pairs(24, answer=7), **chosen)
        prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method=method, **settings)))
    train_and_record(trainer, folder)
