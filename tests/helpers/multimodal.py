"""Small random multimodal models, their processors, and rows of messages with images."""

import copy
import functools
import json
from pathlib import Path

import torch
import transformers

from helpers.models import make_lora

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
# The depth and width differ from those of the language model.
SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 4, "image_size": 16}
GRID = {"depth": 4, "hidden_size": 16, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
SPECIAL = ["<pad>", "<eos>", "<unk>", "<image>", "<video>", "<start>", "<end>"]
PAD, EOS, UNK, IMAGE, VIDEO, START, END = range(7)
VOCABULARY = 97
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}PICTURE{% else %} {{ part.text }} {% endif %}"
    "{% endfor %}{% endfor %}<eos>"
)


def make_llava():
    """Return a model that reads the third of the tower's 4 layers, as LLaVA does by default."""
    text = transformers.LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=3, initializer_range=0.15, **TEXT)
    vision = transformers.CLIPVisionConfig(patch_size=8, projection_dim=32, initializer_range=0.15, **SMALL)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return transformers.LlavaForConditionalGeneration(config)


def make_qwen(kind: str, vision: dict):
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 3,
        "rope_parameters": rope,
        "initializer_range": 0.15,
        **TEXT,
    }
    text |= {"head_dim": 8, "max_window_layers": 3} if kind == "Qwen3VL" else {}
    vision = {**GRID, "initializer_range": 0.15, **vision}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, vision_end_token_id=END, **tokens
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def make_qwen2_5():
    """Return a model with attention in windows in all blocks but one."""
    return make_qwen("Qwen2_5_VL", {"window_size": 8, "fullatt_block_indexes": [2], "spatial_merge_size": 2})


def make_qwen3():
    """Return a model that adds features of the second block to the output of the lowest language layer."""
    return make_qwen(
        "Qwen3VL", {"deepstack_visual_indexes": [1], "num_position_embeddings": 16, "spatial_merge_size": 2}
    )


def make_gemma3():
    text = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "head_dim": 8, "initializer_range": 0.15, **TEXT}
    text |= {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
    vision = transformers.SiglipVisionConfig(patch_size=4, vision_use_head=False, **SMALL)
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        initializer_range=0.15,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.15)  # the default is 0
    return model


MAKERS = {"Llava": make_llava, "Qwen2_5_VL": make_qwen2_5, "Qwen3VL": make_qwen3, "Gemma3": make_gemma3}
# Where the layers are.
PLACES = {
    "Llava": ("model.vision_tower.encoder.layers", "model.language_model.layers"),
    "Qwen2_5_VL": ("model.visual.blocks", "model.language_model.layers"),
    "Qwen3VL": ("model.visual.blocks", "model.language_model.layers"),
    "Gemma3": ("model.vision_tower.encoder.layers", "model.language_model.layers"),
}
# Modules in the attention of both stacks.
TARGETS = {
    "Llava": ["q_proj", "v_proj"],
    "Qwen2_5_VL": r".*(q_proj|v_proj|blocks\.\d+\.attn\.(qkv|proj))",
    "Qwen3VL": r".*(q_proj|v_proj|blocks\.\d+\.attn\.(qkv|proj))",
    "Gemma3": ["q_proj", "v_proj"],
}
NAMES = [*(f"vision.{number}" for number in range(4)), *(f"language.{number}" for number in range(3))]


@functools.cache
def make_base(name: str):
    torch.manual_seed(0)
    return MAKERS[name]()


def make_multimodal(name: str):
    """Return a new model without LoRA, the same each time."""
    return copy.deepcopy(make_base(name))


def make_lora_multimodal(name: str, targets=None):
    return make_lora(make_multimodal(name), targets or TARGETS[name])


def make_tokenizer():
    """Return a tokenizer whose words are numbers, with special tokens."""
    import tokenizers

    words = {word: number for number, word in enumerate([*SPECIAL, *map(str, range(len(SPECIAL), VOCABULARY))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    others = {"image_token": "<image>", "video_token": "<video>", "boi_token": "<start>", "eoi_token": "<end>"}
    others |= {"vision_bos_token": "<start>", "vision_eos_token": "<end>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="right", extra_special_tokens=others, **special
    )


@functools.cache
def make_processor(name: str):
    tokenizer, size = make_tokenizer(), {"height": 16, "width": 16}
    if name == "Llava":
        images = transformers.CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
        return transformers.LlavaProcessor(
            images,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            chat_template=TEMPLATE.replace("PICTURE", "<image>"),
            num_additional_image_tokens=1,
        )
    if name == "Gemma3":
        images = transformers.Gemma3ImageProcessorPil(size=size)
        template = TEMPLATE.replace("PICTURE", "<start>")
        return transformers.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    raise KeyError(name)


def make_image_processor():
    """Return a processor like that of Qwen2.5-VL and Qwen3-VL, which needs torchvision for videos."""
    size = {"shortest_edge": 64, "longest_edge": 1024}
    return transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)


def process(name: str, rows: list[dict]) -> dict:
    """Return messages and images as the processor of a model does."""
    images = [row["images"] for row in rows]
    if not name.startswith("Qwen"):
        processor = make_processor(name)
        texts = [processor.apply_chat_template(row["messages"], tokenize=False) for row in rows]
        given = {"images": [row for row in images if row]} if any(images) else {}
        return dict(processor(text=texts, padding=True, return_tensors="pt", **given))
    seen = [image for row in images for image in row]
    pixels = make_image_processor()(images=seen, return_tensors="pt") if seen else {}
    grids, texts = iter(pixels.get("image_grid_thw", [])), []
    for row in rows:
        parts = [
            f"<start>{' <image>' * (int(next(grids).prod()) // 4)} <end>" if part["type"] == "image" else part["text"]
            for part in row["messages"][0]["content"]
        ]
        texts.append(" ".join([*parts, "<eos>"]))
    batch = {**make_tokenizer()(texts, padding=True, return_tensors="pt", return_token_type_ids=False), **pixels}
    return {**batch, "mm_token_type_ids": (batch["input_ids"] == IMAGE).int()}


class Collator:
    """Makes batches of messages and images with a processor; padding and images have no labels."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, rows: list[dict]) -> dict:
        batch = process(self.name, rows)
        labels = batch["input_ids"].clone()
        labels[(labels < len(SPECIAL)) & (labels != EOS)] = -100
        labels[:, 0] = -100  # the first token has no label
        return {**batch, "labels": labels}


class Rows(torch.utils.data.Dataset):
    """Return rows of a multimodal data set before batching: messages, and images of PIL.

    Args:
        count: the number of rows.
        without: the rows without an image.
        words: the number of words of every row, so that several processes have the loss of one.
        images: the number of images of every row; None: two in the second row, one in the others.
    """

    def __init__(
        self,
        count: int = 13,
        without: tuple[int, ...] = (),
        words: int | None = None,
        images: int | None = None,
    ):
        from PIL import Image

        generator, self.rows = torch.Generator().manual_seed(1), []
        for number in range(count):
            length = int(torch.randint(4, 12, (), generator=generator)) if words is None else words
            length += number in without  # its first word has no label
            text = " ".join(map(str, torch.randint(len(SPECIAL), VOCABULARY, (length,), generator=generator).tolist()))
            seen = 0 if number in without else images or 1 + (number == 1)
            shape = (seen, 16, 16, 3)
            pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            content = [*[{"type": "image"}] * seen, {"type": "text", "text": text}]
            pictures = [Image.fromarray(each.numpy()) for each in pixels]
            self.rows.append({"messages": [{"role": "user", "content": content}], "images": pictures})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]


def make_trainer(name: str, model, folder, rows: Rows | None = None, **arguments):
    """Return a plain transformers Trainer that passes all columns to its collator."""
    values = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "report_to": [], "seed": 3}
    values |= {"remove_unused_columns": False, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **{**values, **arguments})
    model = model(arguments) if callable(model) and not isinstance(model, torch.nn.Module) else model
    return transformers.Trainer(model, arguments, train_dataset=rows or Rows(), data_collator=Collator(name))


def save_multimodal(name: str, folder: Path, rows: Path) -> None:
    """Write a model, its processor and some images to ``folder``, and messages with those images to ``rows``."""
    make_multimodal(name).save_pretrained(folder)
    make_processor(name).save_pretrained(folder)
    lines = []
    for number, row in enumerate(Rows(24, words=6).rows):
        (message,) = row["messages"]
        content = [dict(part) for part in message["content"]]
        for place, image in enumerate(row["images"]):
            content[place]["path"] = str(folder / f"{number}-{place}.png")
            image.save(content[place]["path"])
        lines.append(json.dumps({"messages": [{**message, "content": content}]}) + "\n")
    rows.write_text("".join(lines))


CHOICES = {
    "cka": {"num_samples": 9, "num_layers": 2},
    "relative": {"num_samples": 9, "num_layers": 2},
    "fisher": {"num_samples": 9, "num_layers": 2},
    "gradient": {"num_samples": 9},
    "vision": {"method": "fisher", "stacks": "vision", "num_samples": 9, "num_layers": 2},
    "flexora": {"num_layers": 3, "flexora": {"steps": 2, "val_samples": 4}},
}
LAYER_CLASSES = ["Qwen2_5_VLVisionBlock", "Qwen2_5_VLDecoderLayer"]


def run_process(engine: str, base: str, folder: str) -> None:
    """Choose in both stacks with every method on an engine, train the last choice, and write to ``folder``."""
    import helpers.cpu_engines  # noqa: F401  # lets the engines run without a GPU
    from axolotl_layersel import LayerselConfig, SelectionConfig, prepare_trainer
    from helpers.processes import make_arguments, train_and_record

    name = "Qwen2_5_VL"
    # Adam would take whole steps for the rounding error of tiny gradients.
    chosen = {**make_arguments(engine, LAYER_CLASSES), "adam_epsilon": 1e-3}

    def load(arguments):
        # From a file, because ZeRO-3 then shards it at once.
        model = make_lora(type(make_base(name)).from_pretrained(base, dtype=torch.float32), TARGETS[name])
        model.enable_input_require_grads()
        return model

    for choice, settings in CHOICES.items():
        # Every micro-batch has an image: engines that split weights hang without one.
        trainer = make_trainer(name, load, Path(folder) / choice, Rows(24, without=(4,), words=6), **chosen)
        selection = SelectionConfig(**{"method": choice, "stacks": "both", **settings})
        prepare_trainer(trainer, LayerselConfig(selection=selection))
    train_and_record(trainer, folder)
