"""Does `axolotl-layersel compare` give the right answer where the answer is known?

    python benchmarks/planted_compare.py FOLDER benchmarks/results/planted_compare.csv --tasks damaged intact

Two tasks, each with several seeds, which draw the damage and the rows:

* ``damaged``: two of eight layers are damaged (see planted.py), layer 0 among them, which no other layer can make up
  for. Rank is scarce (r 1), so ``gradient``, which gives it to the layers that need it, is better than plain LoRA.
  ``random`` has two layers at four times the rank.
* ``intact``: the base is fine-tuned on more of what it was pre-trained on. Little can be gained, and no arm gains more
  than another, so the right answer is plain LoRA.

Damage further up may be repaired by the layers around it as well, and LoRA at a higher rate is then as good.

Each comparison is the command itself. Its cells are processes that are forked from one that has imported Axolotl, which
spares the imports; ``--whole`` starts each as the command does. A comparison that exists in FOLDER is read and goes on.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from axolotl_layersel.cli.compare import running
from axolotl_layersel.cli.compare.command import Options, compare
from axolotl_layersel.cli.compare.figures import COMPARISON, Comparison, read_record
from axolotl_layersel.cli.compare.summary import summarise
from benchmarks.held_out.runs import append_lines
from benchmarks.planted import (
    LAYERS,
    LENGTH,
    LINEARS,
    draw_damaged,
    make_damaged,
    make_model,
    make_rows,
    make_text,
    pretrain,
)

ROOT = Path(__file__).resolve().parents[1]
ANSWERS = {"damaged": "gradient", "intact": "lora"}
RATES = {"damaged": (0.008, 0.016), "intact": (0.008,)}  # the base gains nothing by the higher one
STEPS, BATCH, HELD_OUT = 20, 8, 64
ARM = "gradient"
ARMS = {ARM: {"layersel": {"selection": {"method": "gradient", "num_samples": 32}}}}
SEEDS = [seed for seed in range(100) if 0 in draw_damaged(seed)][:5]
SEED_FACTOR = 100  # with the seed of the damage, `random` would draw the damaged layers, as draw_damaged does
COLUMNS = ["task", "yaml_seed", "damaged", "seeds", "arm", "right", "rate", "lora", "gradient_less_lora", "low", "high"]
COLUMNS += ["standing", "gradient_less_random", "random_low", "random_high", "losses"]


# --- The model, the rows and the YAML file --------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one token for each of the first 128 characters; the last one is that of padding."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token=chr(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    names = {"eos_token": chr(0), "unk_token": chr(0), "pad_token": chr(127)}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **names).save_pretrained(folder)


def write_task(folder: Path, task: str, seed: int, base: Path) -> None:
    """Write the base model, the rows and the YAML file of a comparison; in a process of its own, since it runs torch.

    Args:
        folder: of the comparison.
        task: ``damaged`` or ``intact``.
        seed: of the YAML file.
        base: the file of the pre-trained weights, which is made if it is missing.
    """
    import torch

    text = make_text()
    if not base.exists():
        torch.save(pretrain(text), base)
    weights = torch.load(base)
    model = make_damaged(weights, seed) if task == "damaged" else make_model()
    if task == "intact":
        model.load_state_dict(weights)
    folder.mkdir(parents=True)
    model.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    rows = make_rows(text, STEPS * BATCH + 2 * HELD_OUT, seed=1000 + seed)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "base_model": str(folder / "base"),
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json"}],
        "output_dir": str(folder / "output"),
        "adapter": "lora",
        "lora_r": 1,
        "lora_alpha": 2,
        "lora_dropout": 0.0,
        "lora_target_modules": LINEARS,
        "sequence_len": LENGTH,
        "micro_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "max_steps": STEPS,
        "learning_rate": RATES[task][0],
        "warmup_steps": 2,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "bf16": False,
        "tf32": False,
        **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False),  # they need a GPU
        "gradient_checkpointing": False,
        "val_set_size": HELD_OUT,
        "dataloader_num_workers": 0,
        "seed": SEED_FACTOR * seed,
        # The arm `random` takes these settings.
        "layersel": {"selection": {"method": "random", "num_layers": 2, "rank_allocation": "match"}},
    }
    (folder / "arms.yml").write_text(yaml.safe_dump(ARMS))
    (folder / "run.yml").write_text(yaml.safe_dump(content, sort_keys=False))


# --- Cells ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def forked_cells():
    """Start the cells of a comparison by a server that has imported Axolotl, within the block."""
    sys.path.append(str(ROOT / "tests"))
    from helpers.launched import start_zygote

    launch = running.launch
    with start_zygote() as server:

        def fork(command: list[str], log: Path) -> int:
            config = command[command.index("train") + 1]
            (code,) = server.run("axolotl.cli.train:do_cli", {"config": config}, 1, log, {})
            os.replace(f"{log}.0", log)
            return code

        running.launch = fork
        try:
            yield
        finally:
            running.launch = launch


# --- Results --------------------------------------------------------------------------------------------------------


def make_line(comparison: Comparison, task: str, seed: int) -> dict[str, Any]:
    """Return the line of a comparison in the CSV file. Intervals to ``lora`` are those that the answer is by."""
    summary = summarise(comparison)
    judgement = summary.arms[ARM].judgement
    if judgement is None or judgement.to_lora is None or judgement.to_random is None:
        raise RuntimeError(f"{comparison.settings.folder}: {[each.sentence for each in comparison.failures]}")
    to_lora, to_random = judgement.to_lora, judgement.to_random
    losses = {
        arm: {"rate": each.rate, "test": {seed: round(cell.test_loss, 5) for seed, cell in each.cells.items()}}
        for arm, each in summary.arms.items()
    }
    claim, interval = to_lora.claim, to_random.interval
    return {
        "task": task,
        "yaml_seed": SEED_FACTOR * seed,
        "damaged": " ".join(map(str, draw_damaged(seed))) if task == "damaged" else "",
        "seeds": len(comparison.settings.seeds),
        "arm": summary.best,
        "right": summary.best == ANSWERS[task],
        "rate": summary.arms[summary.best].rate,
        "lora": round(to_lora.reference, 5),
        "gradient_less_lora": round(to_lora.mean, 5),
        "low": round(claim.low, 5) if claim else "",
        "high": round(claim.high, 5) if claim else "",
        "standing": judgement.standing,
        "gradient_less_random": round(to_random.mean, 5),
        "random_low": round(interval.low, 5) if interval else "",
        "random_high": round(interval.high, 5) if interval else "",
        "losses": json.dumps(losses),
    }


def run(arguments: argparse.Namespace, task: str, seed: int) -> dict[str, Any]:
    """Run one comparison, and return its line of the CSV file."""
    folder = arguments.folder / f"{task}-{seed}"
    if not folder.exists():
        maker = multiprocessing.get_context("fork").Process(
            target=write_task, args=(folder, task, seed, arguments.folder / "base.pt")
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise RuntimeError(f"{folder} could not be made")
    # The rates are given, so that all comparisons of a task have the same.
    fixed: dict[str, Any] = {"rates": ",".join(f"{rate:g}" for rate in RATES[task]), "widen": 0, "refine": False}
    options = Options(arms_file=folder / "arms.yml", seeds=arguments.training_seeds, **fixed)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        compare(folder / "run.yml", {}, options, ["--launcher", "python"])
    (folder / "said.txt").write_text(said.getvalue())
    return make_line(read_record(Comparison, folder / "output" / "compare" / COMPARISON), task, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of models, rows and comparisons")
    parser.add_argument("output", type=Path, help="the CSV file, which gets a line for each comparison")
    parser.add_argument("--tasks", nargs="+", choices=ANSWERS, default=list(ANSWERS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=SEEDS, help="of damage and rows; that of the YAML file is 100 times it"
    )
    parser.add_argument("--training-seeds", type=int, default=3, help="of each comparison, as the command's default")
    parser.add_argument("--whole", action="store_true", help="start each cell as the command does")
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()  # the server of the cells runs in another folder
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(f"{LAYERS} layers, {STEPS} steps of {BATCH} rows", flush=True)
    with contextlib.nullcontext() if arguments.whole else forked_cells():
        for task in arguments.tasks:
            for seed in arguments.seeds:
                line = run(arguments, task, seed)
                append_lines(arguments.output, COLUMNS, [line])
                print({key: line[key] for key in COLUMNS[:-1]}, flush=True)


if __name__ == "__main__":
    main()
