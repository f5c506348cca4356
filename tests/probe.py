"""An Axolotl plugin that records, from inside a run, what the tests assert on. It changes nothing.

``LAYERSEL_TEST_SIGNAL="KILL:3"`` sends every rank SIGKILL at the end of step 3; ``"INT:3"`` sends rank 0
alone SIGINT, as an impatient scheduler might.
"""

import json
import os
import signal
from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin
from safetensors.torch import save_file
from transformers import TrainerCallback

from axolotl_layersel import adapters, engines

TOKENS = torch.arange(40).reshape(2, 20) + 300


def count_optimized(trainer) -> int:
    """Return how many parameters the engine's own optimizer holds, over all ranks' shards."""
    engine = engines.name_engine(trainer)
    if engine in ("zero1", "zero2"):
        return sum(p.numel() for group in trainer.model_wrapped.optimizer.bit16_groups for p in group)
    if engine == "zero3":
        return sum(p.ds_numel for group in trainer.model_wrapped.optimizer.fp16_groups for p in group)
    return sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])


class ProbeCallback(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer
        self.folder = Path(trainer.args.output_dir)

    def on_train_begin(self, args, state, control, **kwargs):
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        parameters = adapters.adapter_parameters(model)
        weights = {name: engines.gather_parameter(p).contiguous() for name, p in parameters.items()}
        if args.process_index == 0:
            save_file(weights, self.folder / f"weights_at_{state.global_step}.safetensors")
            record = json.loads((self.folder / "engine.json").read_text())
            record["optimized"] = count_optimized(self.trainer)
            (self.folder / "engine.json").write_text(json.dumps(record))

    def on_step_end(self, args, state, control, **kwargs):
        name, _, step = os.environ.get("LAYERSEL_TEST_SIGNAL", "").partition(":")
        if name == "KILL" and state.global_step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "INT" and state.global_step == int(step) and args.process_index == 0:
            os.kill(os.getpid(), signal.SIGINT)


class ProbePlugin(BasePlugin):
    recorded = False

    def add_callbacks_post_trainer(self, cfg, trainer):
        return [ProbeCallback(trainer)]

    def post_train(self, cfg, model):
        """Keep the logits of the model in training; Axolotl calls this again without a process group."""
        if self.recorded:
            return
        self.recorded = True
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=TOKENS).logits
        if engines.get_rank() == 0:
            save_file({"logits": logits.float().contiguous()}, Path(cfg.output_dir) / "logits.safetensors")
