"""Settings of runs: blocks of the plugin, engines, data."""

import json
from pathlib import Path

from helpers.places import SCORING


def selection(method: str = "cka", **values) -> dict:
    """Return a ``layersel`` block; the number of rows is odd, so that two processes have unequal shares."""
    scoring = {"num_samples": 15} if method in SCORING else {}
    return {"layersel": {"selection": {"method": method, **scoring, **values}}}


# The best checkpoint is the first one: the loss falls, so the greatest eval loss is the earliest.
BEST_IS_FIRST = {
    "eval_steps": 2,
    "val_set_size": 0.03,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}


CHECKPOINTING = {"none": None, "reentrant": {"use_reentrant": True}, "non-reentrant": {"use_reentrant": False}}


def checkpoint_layers(kind: str) -> dict:
    """Return the settings of a run or a trainer that compute layers again, of a kind in ``CHECKPOINTING``."""
    options = CHECKPOINTING[kind]
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options} if options else {}


# For runs that must equal plain LoRA. Each step has two micro-batches, and gradients are clipped.
ACCUMULATED = {
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.01,
    "max_steps": 6,
    "num_epochs": 2,
    "save_steps": 6,
    "val_set_size": 0.1,
    "warmup_steps": 2,
}


PLAIN = {**ACCUMULATED, **selection("flexora", ratio=1.0, flexora={"steps": 6, "gate_lr": 0, "val_source": "eval"})}


PACKED_QLORA = {
    "adapter": "qlora",
    "load_in_4bit": True,
    "sample_packing": True,
    "pad_to_sequence_len": True,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
}


def l1ra(**values) -> dict:
    """Return a ``layersel`` block that redistributes rank."""
    return {"layersel": {"l1ra": values}}


def pressure(**values) -> dict:
    """Return a ``layersel`` block that redistributes rank by ``rule: pressure`` with ``budget_unit: rank``."""
    return l1ra(**{"rule": "pressure", "budget_unit": "rank", **values})


def preferences(folder: Path, rl: str = "dpo") -> dict:
    """Write 24 pairs of answers to ``folder``, and return the YAML keys to train on them.

    ``rl`` is a kind of preference training such as dpo or orpo, or reward for a reward model.
    """
    path = folder / "preferences.jsonl"
    rows = []
    for i in range(24):
        asked = {"role": "user", "content": f"How many apples are {i} and {i + 1}?"}
        chosen = {"role": "assistant", "content": f"They are {2 * i + 1} apples."}
        rejected = {"role": "assistant", "content": f"They are {2 * i} pears."}
        if rl == "orpo":
            rows.append({"chosen": [asked, chosen], "rejected": [asked, rejected]})
        elif rl == "reward":
            answers = {"chosen": chosen["content"], "rejected": rejected["content"]}
            rows.append({"system": "", "input": asked["content"], **answers})
        else:
            rows.append({"conversation": [asked], "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(path), "ds_type": "json"}
    if rl == "orpo":
        data["type"] = "chat_template.argilla"
    elif rl == "reward":
        data["type"] = "bradley_terry.chat_template"
    else:
        data.update(type="chat_template.default", field_messages="conversation")
    kind = {"reward_model": True} if rl == "reward" else {"rl": rl}
    return {**kind, "datasets": [data], "chat_template": "chatml"}


def deepspeed_config(stage: int) -> dict:
    zero = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    if stage == 3:
        # By default parameters under 1e5 elements are not partitioned, so a small model would test nothing.
        zero.update(stage3_param_persistence_threshold=0, stage3_gather_16bit_weights_on_model_save=False)
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    return {"zero_optimization": zero, "gradient_clipping": "auto", **dict.fromkeys(automatic, "auto")}


def engine_settings(engine: str, folder: Path) -> tuple[dict, int]:
    """Return the YAML keys that choose ``engine``, and its number of processes.

    ``fsdp2-full`` loads weights on one process only, ``fsdp2-full-everywhere`` on each, as 4-bit weights need.
    """
    if engine == "single":
        return {}, 1
    if engine == "ddp":
        return {}, 2
    if engine.startswith("zero"):
        path = folder / f"{engine}.json"
        path.write_text(json.dumps(deepspeed_config(int(engine[-1]))))
        return {"deepspeed": str(path)}, 2
    kind = "SHARDED_STATE_DICT" if "sharded" in engine else "FULL_STATE_DICT"
    offloaded = engine.endswith("offloaded")
    config = {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "cpu_ram_efficient_loading": "full" in engine and not engine.endswith("everywhere"),
        "offload_params": offloaded,
        # Memory is pinned for an accelerator, which the CPU does not have.
        **({"cpu_offload_pin_memory": False} if offloaded else {}),
        # With False whole weights also remain after an evaluation, which writes to shards must handle.
        "reshard_after_forward": "full" in engine,
        "state_dict_type": kind,
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    }
    return {"fsdp_version": 2, "fsdp_config": config}, 2
