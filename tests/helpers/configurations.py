"""Every class of transformers that a run could train, built from its default configuration on the meta device."""

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

# By kind of model: the mappings of transformers that list its classes.
KINDS = {
    "causal language models": ("CAUSAL_LM",),
    "masked language models": ("MASKED_LM",),
    "encoders with decoders": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "models of text and other inputs": ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"),
    "classifiers of rows": ("SEQUENCE_CLASSIFICATION",),
    "classifiers of tokens": ("TOKEN_CLASSIFICATION",),
}
# The models without a head of all model types that none of these mappings has, such as those of images and audio.
OTHERS = "models of other types"
# The attributes that hold numbers of layers, and the numbers to try instead: two of them, because a list of another
# kind, such as experts, may have the same length as one.
COUNTS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth"),
    *("num_decoder_layers", "num_encoder_layers"),
)
TRIED = (3, 5)
TOWER = re.compile("vision|audio|image")
# The name of an entry of an outermost list, followed by more of the path.
ENTRY = re.compile(r"(?:.*?\.)?\d+(?=\.)")
# Settings that transformers' defaults lack, by model type, or by class if they differ between its classes.
TURNED = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}
NEEDED: dict[str, dict] = {
    **{name: {"head_dim": 128} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": TURNED},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": TURNED},
    "ReformerModelWithLMHead": {"is_decoder": True},
}


def list_classes(kind: str) -> list[tuple[str, str]]:
    """Return the model types and the names of the classes of a kind, once each."""
    if kind == OTHERS:
        of_text = {model_type for other in KINDS for model_type, _ in list_classes(other)}
        mappings = [{key: names for key, names in modeling_auto.MODEL_MAPPING_NAMES.items() if key not in of_text}]
    else:
        mappings = [getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES") for mapping in KINDS[kind]]
    found: dict[str, str] = {}
    for mapping in mappings:
        for model_type, names in mapping.items():
            for name in names if isinstance(names, (tuple, list)) else [names]:
                found.setdefault(name, model_type)
    return [(model_type, name) for name, model_type in found.items()]


def find_config(name: str, model_type: str) -> PreTrainedConfig:
    """Return the default configuration of a class; it may be a part of the configuration of its model type."""
    kind = getattr(transformers, name).config_class or getattr(transformers, CONFIG_MAPPING_NAMES[model_type])
    return kind(**find_needed(name, model_type))


def find_needed(name: str, model_type: str) -> dict:
    """Return the settings that the configuration of a class needs in addition to its defaults.

    They are a copy, because configurations of several parts take entries out of what they are given.
    """
    return copy.deepcopy(NEEDED.get(name, NEEDED.get(model_type, {})))


def shorten(config: PreTrainedConfig, layers: int, needed: dict) -> PreTrainedConfig:
    """Return a new configuration of the same class with ``layers`` layers, and one more in towers."""
    values = vars(config)
    fewer = {name: layers for name in COUNTS if isinstance(values.get(name), int) and values[name] > layers}
    parts = {
        name: shorten(part, layers + bool(TOWER.search(name)), needed.get(name, {}))
        for name, part in values.items()
        if isinstance(part, PreTrainedConfig)
    }
    return type(config)(**{**needed, **fewer, **parts})


def build(name: str, model_type: str, layers: int) -> PreTrainedModel:
    """Return a model of a class on the meta device; with all its layers if it does not accept fewer."""
    cls, config = getattr(transformers, name), find_config(name, model_type)
    with torch.device("meta"):
        try:
            return cls(shorten(config, layers, find_needed(name, model_type)))
        except Exception:  # families raise different errors if the number of layers conflicts with other settings
            return cls(config)


def put_lora(base: PreTrainedModel) -> PeftModel:
    """Return a model with LoRA on the first linear module of each entry of its outermost lists of modules.

    Raises:
        ValueError: if there is no such module, or PEFT refuses it.
    """
    first: dict[str, str] = {}
    for name, module in base.named_modules():
        entry = ENTRY.match(name)
        # PEFT refuses LoRA on the out_proj of Mamba.
        if entry and isinstance(module, (nn.Linear, Conv1D)) and not name.endswith("out_proj"):
            first.setdefault(entry[0], name)
    if not first:
        raise ValueError("no list of modules with linear ones in them")
    with torch.device("meta"):
        return get_peft_model(base, LoraConfig(r=2, target_modules=list(first.values())))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings within the block."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(verbosity)
