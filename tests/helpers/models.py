"""Small models with LoRA, rows and trainers."""

import types
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from axolotl_layersel.lora.layers import find_layer_stack


def make_small_llama(layers: int = 6, seed: int = 0, **settings):
    """Return a random Llama of width 32 with ``layers`` layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **{"vocab_size": 97, **values, **settings}))


def make_small_bert(kind: str = "BertForMaskedLM", **settings):
    """Return a random BERT of width 32 with 4 layers, of one of transformers' classes."""
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    return getattr(transformers, kind)(transformers.BertConfig(vocab_size=97, **size, **settings))


def make_lora(model, targets: object = ("q_proj", "v_proj", "down_proj"), **settings):
    """Return ``model`` with LoRA of rank 4; the target modules are a list or a regular expression."""
    from peft import LoraConfig, get_peft_model

    targets = targets if isinstance(targets, str) else list(targets)
    return get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **settings}))


def make_rows(count: int = 24, seed: int = 0, longest: int = 20) -> list[dict]:
    """Return token rows of different lengths that all end in the token 1."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(6, longest, (1,), generator=generator))
        ids = [*torch.randint(3, 97, (length,), generator=generator).tolist(), 1]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * 3 + ids[3:]})
    return rows


def make_selection(trainer, method: str = "cka", **settings):
    """Return the ``Selection`` of a trainer's run by ``method``."""
    from axolotl_layersel.config.selection import SelectionConfig
    from axolotl_layersel.lora.run import Run
    from axolotl_layersel.selection.types import Selection

    run = Run.of(trainer)
    settings = SelectionConfig(method=method, **settings)
    return Selection.of(run, find_layer_stack(run.model), settings.resolve(trainer.args.seed))


def describe_engine(kind: str, plugins: dict):
    """Return the part of a trainer that the name of its engine is read from."""
    state = types.SimpleNamespace(**plugins)
    accelerator = types.SimpleNamespace(
        distributed_type=types.SimpleNamespace(value=kind), state=state, parallelism_config=None
    )
    return types.SimpleNamespace(accelerator=accelerator)


def make_trainer(model, folder: Path, rows: list[dict] | None = None, **arguments):
    """Return a plain transformers Trainer of ``model`` on ``rows``; ``model`` may be a function of the arguments."""
    from datasets import Dataset
    from torch.nn.utils.rnn import pad_sequence
    from transformers import Trainer, TrainingArguments

    def collate(batch: list[dict]) -> dict:
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        columns = {name: [torch.tensor(row[name]) for row in batch] for name in fill}
        return {
            name: pad_sequence(columns[name], True, value) if columns[name][0].dim() else torch.stack(columns[name])
            for name, value in fill.items()
        }

    values = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "report_to": [], "seed": 3}
    arguments = TrainingArguments(output_dir=str(folder), **{"use_cpu": True, **values, **arguments})
    model = model if isinstance(model, torch.nn.Module) else model(arguments)
    return Trainer(model, arguments, train_dataset=Dataset.from_list(rows or make_rows()), data_collator=collate)


SIDE = {"ffn_dim": 48, "attention_heads": 4}


def make_gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4))


def make_llava():
    """A vision tower that has as many layers as the language model, and modules of the same names."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    text = LlamaConfig(vocab_size=97, num_key_value_heads=2, **size)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=32, **size)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=96))


def make_t5(layers: int = 4):
    """A decoder of ``layers`` layers with an encoder of 4."""
    from transformers import T5Config, T5ForConditionalGeneration

    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 4}
    config = T5Config(vocab_size=97, num_decoder_layers=layers, decoder_start_token_id=0, **size)
    return T5ForConditionalGeneration(config)


def bart_config(layers: int):
    from transformers import BartConfig

    size = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIDE.items()}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1}
    return BartConfig(vocab_size=97, d_model=32, encoder_layers=4, decoder_layers=layers, **size, **tokens)


def make_bart(layers: int = 4):
    """A decoder of ``layers`` layers with an encoder of 4 whose modules have the same names."""
    from transformers import BartForConditionalGeneration

    return BartForConditionalGeneration(bart_config(layers))


def make_bart_decoder(layers: int = 4):
    """The part of BART that Axolotl loads by default."""
    from transformers import BartForCausalLM

    return BartForCausalLM(bart_config(layers))


def make_mixtral():
    """As many experts as layers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=97, num_hidden_layers=4, num_local_experts=4, **size))


def make_opt(**settings):
    from transformers import OPTConfig, OPTForCausalLM

    size = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(vocab_size=97, num_hidden_layers=3, **size, **settings))


def make_gpt_neox(**settings):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=97, **size, **settings))


def make_phi3():
    from transformers import Phi3Config, Phi3ForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    return Phi3ForCausalLM(Phi3Config(vocab_size=97, pad_token_id=0, **size))
