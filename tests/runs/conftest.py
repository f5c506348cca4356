"""A small pre-trained base, its data, and runs of real Axolotl on every engine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported

import pytest
import yaml
from helpers.launched import MadeOnce, Run, start_zygote
from helpers.places import ENVIRONMENT, HANGS, ROOT
from helpers.published import Built, build
from helpers.settings import PLAIN, engine_settings, selection


@pytest.fixture(scope="session")
def zygote():
    with start_zygote() as server:
        yield server


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Built:
    """The published files of the checkout."""
    return build(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    """A Llama of 8 layers, pre-trained for a few steps so that its layers differ."""
    folder = tmp_path_factory.mktemp("base") / "base"
    code = (
        "from pathlib import Path; from demo.prepare import pretrain;"
        f"pretrain(Path({str(folder)!r}), seconds=3600, max_steps=40, hidden_size=64, layers=8, heads=4)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, **ENVIRONMENT})
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory, base_model) -> Path:
    """64 word problems as JSON lines, with the same number of tokens in every answer.

    Axolotl averages the loss over processes, not tokens. Only with equal numbers do one and two processes train alike.
    """
    from collections import Counter

    from tokenizers import Tokenizer

    from demo.prepare import write_problems

    tokenizer = Tokenizer.from_file(str(base_model / "tokenizer.json"))
    problems = [(len(tokenizer.encode(row["output"]).ids), row) for row in write_problems(600, seed=2)]
    ((most_common, _),) = Counter(length for length, _ in problems).most_common(1)
    rows = [row for length, row in problems if length == most_common][:64]
    assert len(rows) == 64
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def make_config(base_model, data, tmp_path_factory):
    """Return a function that writes a YAML file for a small LoRA run and returns its path and processes."""

    def make(engine: str = "single", output: Path | None = None, **overrides) -> tuple[Path, int, Path]:
        folder = tmp_path_factory.mktemp(engine)
        output = output or folder / "output"
        chosen, world = engine_settings(engine, folder)
        values = {
            "base_model": str(base_model),
            "plugins": [
                "helpers.cpu_engines.CpuEnginesPlugin",
                "helpers.probe.ProbePlugin",
                "axolotl_layersel.LayerSelectionPlugin",
                "helpers.probe.RankProbePlugin",
            ],
            "datasets": [{"path": str(data), "type": "alpaca", "ds_type": "json"}],
            "dataset_prepared_path": str(tmp_path_factory.getbasetemp() / "prepared"),
            "output_dir": str(output),
            "adapter": "lora",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
            "sequence_len": 128,
            "micro_batch_size": 2 // world,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "max_steps": 6,
            "learning_rate": 0.005,
            "optimizer": "adamw_torch",
            "lr_scheduler": "cosine",
            "bf16": False,
            "tf32": False,
            "lora_mlp_kernel": False,
            "lora_qkv_kernel": False,
            "lora_o_kernel": False,
            "gradient_checkpointing": False,
            "seed": 7,
            "val_set_size": 0,
            "save_steps": 2,
            "logging_steps": 1,
            "dataloader_num_workers": 0,
            **selection(ratio=0.5),
            **chosen,
            **overrides,
        }
        path = folder / "config.yml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path, world, output

    return make


@pytest.fixture(scope="session")
def train(zygote, make_config):
    """Return a function that trains with real Axolotl on an engine and returns the finished run.

    ``elsewhere`` are settings that differ in all processes but the first. After ``timeout`` seconds all are killed.
    """

    def run(
        engine: str = "single",
        *,
        expect: int | None = 0,
        env: dict | None = None,
        elsewhere: dict | None = None,
        timeout: float = HANGS,
        **settings,
    ) -> Run:
        path, world, output = make_config(engine, **settings)
        log = path.with_suffix(f".{zygote.jobs}.log")
        paths = [path] * world
        if elsewhere is not None:
            other, _, _ = make_config(engine, **{**settings, "output": output, **elsewhere})
            paths = [path, *[other] * (world - 1)]
        args = [{"config": str(each)} for each in paths]
        codes = zygote.run("axolotl.cli.train:do_cli", args, world, log, env or {}, timeout)
        text = "\n".join(Path(f"{log}.{rank}").read_text() for rank in range(world))
        if expect is not None:
            assert codes == [expect] * world, f"exit codes {codes}\n{text[-6000:]}"
        return Run(output, codes, re.sub(r"\x1b\[[0-9;]*m", "", text))

    return run


@pytest.fixture(scope="session")
def make_plan(zygote, make_config):
    """Return a function that selects on an engine without training, and returns the plan."""

    def make(engine: str = "single", **settings) -> dict:
        path, world, output = make_config(engine, **settings)
        log = path.with_suffix(".plan.log")
        codes = zygote.run("axolotl_layersel.cli.worker:main", {"config": str(path)}, world, log, {})
        assert codes == [0] * world, (path.parent / f"{log.name}.0").read_text()[-4000:]
        plan = json.loads((output / "layersel" / "plan.json").read_text())
        assert plan["engine"] == engine.split("-")[0]
        return plan

    return make


@pytest.fixture(scope="session")
def plain_runs(train) -> dict[str, Run]:
    """A run of plain LoRA in all layers on each engine, with two micro-batches a step and clipped gradients.

    A search with the same number of steps on the same rows comes first. Its gates stay at 0, so it is plain LoRA too.
    """
    return MadeOnce(lambda engine: train(engine, **PLAIN))
