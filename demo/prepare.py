"""Make the base model and the data of the demo, without downloads.

The base is a small Llama, pre-trained for a minute or two on the sources and docstrings of the Python
standard library. The fine-tuning data are generated word problems with worked answers.
"""

import argparse
import json
import math
import os
import random
import shutil
import sysconfig
import time
from pathlib import Path

VOCABULARY = 2048
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]


def read_standard_library(max_characters: int = 3_000_000) -> list[str]:
    """Return the text of the standard library's modules, in a fixed order, up to ``max_characters``."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [
        path
        for path in sorted(root.rglob("*.py"))
        if not {"site-packages", "dist-packages", "test", "tests", "lib2to3", "encodings"} & set(path.parts)
    ]
    random.Random(0).shuffle(paths)
    texts, total = [], 0
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="ignore")
        texts.append(text)
        total += len(text)
        if total >= max_characters:
            break
    return texts


def train_tokenizer(texts: list[str]):
    """Return a byte-level BPE tokenizer of ``VOCABULARY`` tokens, trained on ``texts`` and some word problems."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    problems = [f"{row['instruction']}\n{row['output']}" for row in write_problems(300, seed=1)]
    tokenizer.train_from_iterator(texts[:150] + problems, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=1024
    )


def pretrain(
    output: Path,
    seconds: float = 90,
    max_steps: int | None = None,
    hidden_size: int = 160,
    layers: int = 8,
    heads: int = 4,
    seed: int = 0,
    report=print,
) -> None:
    """Pre-train a small Llama and write it, with its tokenizer, to ``output``.

    Training stops after ``seconds`` or ``max_steps`` steps, whichever is first. The folder appears only when it is
    complete, so that an interrupted call leaves no partial model.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = read_standard_library()
    tokenizer = train_tokenizer(texts)
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    tokens = torch.tensor([token for encoding in encodings for token in [*encoding.ids, 1]])
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 8 // 3 // 16 * 16,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    # Small batches: in so little time many steps help more than smooth ones.
    peak, length, batch = 3e-3, 128, 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    started, reported, step, mean = time.monotonic(), 0.0, 0, math.log(VOCABULARY)
    while (done := time.monotonic() - started) < seconds and (max_steps is None or step < max_steps):
        progress = step / max_steps if max_steps else done / seconds
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 20) * (1 - 0.9 * progress)
        starts = torch.randint(len(tokens) - length, (batch,)).tolist()
        rows = torch.stack([tokens[start : start + length] for start in starts])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        mean += 0.02 * (loss.item() - mean)
        if done >= reported + 10:
            reported = done
            report(f"pre-training the base model: {done:.0f} s, step {step}, loss {mean:.2f}")
    report(f"pre-trained the base model: {step} steps, loss {mean:.2f}")

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(output, ignore_errors=True)
    os.replace(partial, output)


NAMES = ["Ada", "Ben", "Chloe", "Dara", "Emil", "Fatima", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena"]
THINGS = ["apples", "books", "coins", "cards", "pencils", "shells", "stamps", "stones", "tickets"]


def write_problems(count: int, seed: int) -> list[dict[str, str]]:
    """Return ``count`` word problems with worked answers, as ``instruction`` and ``output``."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        first, second = draw.sample(NAMES, 2)
        thing = draw.choice(THINGS)
        have, other, times = draw.randint(3, 40), draw.randint(2, 20), draw.randint(2, 5)
        kind = draw.randrange(3)
        if kind == 0:
            question = f"{first} has {have} {thing} and {second} gives {first} {other} more. How many {thing} now?"
            answer = f"{have} + {other} = {have + other}\n#### {have + other}"
        elif kind == 1:
            question = f"{first} had {have + other} {thing} and gave {other} to {second}. How many {thing} are left?"
            answer = f"{have + other} - {other} = {have}\n#### {have}"
        else:
            question = f"{first} has {other} {thing}; {second} has {times} times as many. How many has {second}?"
            answer = f"{other} * {times} = {other * times}\n#### {other * times}"
        rows.append({"instruction": question, "output": answer})
    return rows


def write_data(path: Path, count: int, seed: int) -> None:
    """Write ``count`` word problems as JSON lines to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in write_problems(count, seed)))
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo/work"), help="folder for the base and the data")
    parser.add_argument("--seconds", type=float, default=90, help="time to pre-train")
    parser.add_argument("--max-steps", type=int, default=None, help="stop pre-training after this many steps")
    arguments = parser.parse_args()
    base = arguments.work / "base"
    if (base / "config.json").exists():
        print(f"the base model exists already: {base}")
    else:
        arguments.work.mkdir(parents=True, exist_ok=True)
        pretrain(base, arguments.seconds, arguments.max_steps)
    # Axolotl names tokenised data by the path of the file, so copies of other content must be removed.
    shutil.rmtree(arguments.work / "prepared", ignore_errors=True)
    write_data(arguments.work / "train.jsonl", 480, seed=2)
    write_data(arguments.work / "eval.jsonl", 48, seed=3)


if __name__ == "__main__":
    main()
