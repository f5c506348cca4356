"""Frozen LoRA stays frozen in trainers that switch to a reference adapter in every loss."""

import json

import pytest
import torch
from helpers.generation import train_by_grpo
from helpers.settings import selection


def read_norms(run) -> list[float]:
    """Return the norm of the gradient in each step of a run of Axolotl."""
    state = json.loads((run.folder / "checkpoint-6" / "trainer_state.json").read_text())
    return [log["grad_norm"] for log in state["log_history"] if "grad_norm" in log]


def test_frozen_lora_takes_no_part_in_a_run_of_axolotl_by_grpo_with_a_reference(train, tmp_path):
    """Frozen LoRA with B = 0 adds nothing, so the run must equal one without LoRA there."""
    settings = {**train_by_grpo(tmp_path), "save_steps": 6, "logging_steps": 1, "max_grad_norm": 1e-3}
    settings["trl"] = {**settings["trl"], "beta": 0.1}
    frozen, removed = (
        train(**settings, **selection("last", ratio=0.5, unselected=unselected)) for unselected in ("freeze", "remove")
    )
    norms = read_norms(removed)
    assert len(norms) == 6 and sum(norm > 1e-3 for norm in norms) > 3, "most gradients are clipped"
    assert read_norms(frozen) == pytest.approx(norms, rel=1e-4)
    kept = removed.adapter()
    for name, value in frozen.adapter().items():
        if name in kept:
            torch.testing.assert_close(value, kept[name], atol=1e-6, rtol=1e-4)
        else:
            assert "lora_A" in name or not value.any(), f"{name} trained"
