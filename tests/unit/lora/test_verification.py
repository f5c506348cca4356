import copy
import itertools
from pathlib import Path

import pytest
import torch
from helpers.corruptions import NAME, leave_one_out, round_one, spoil_one, zero_one
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from axolotl_layersel.common import tensors as tensors_file
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.lora import layouts, verification
from axolotl_layersel.lora.factors import Factors, fold


@given(
    st.integers(1, 200),
    st.lists(st.integers(0, 200), max_size=4),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8]),
)
def test_the_fingerprints_of_parts_add_up_to_that_of_the_whole(size, cuts, seed, dtype):
    whole = (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
    bounds = sorted({0, size, *(cut for cut in cuts if cut < size)})
    parts = [verification.fingerprint(whole[start:end], start) for start, end in itertools.pairwise(bounds)]
    assert torch.equal(sum(parts), verification.fingerprint(whole))
    assert int(verification.fingerprint(whole)[0]) == int(whole.count_nonzero())


def test_a_fingerprint_knows_every_bit_and_every_place(monkeypatch):
    whole = torch.randn(50)
    taken = verification.fingerprint(whole)
    flipped = whole.clone()
    flipped.view(torch.int32)[7] ^= 1
    swapped = whole[torch.tensor([1, 0, *range(2, 50)])]
    for other in (flipped, swapped, whole.roll(1), torch.zeros(50), whole.bfloat16().float()):
        assert not torch.equal(verification.fingerprint(other), taken)
    assert verification.fingerprint(torch.empty(0)).tolist() == [0, 0]
    monkeypatch.setattr(verification, "CHUNK", 7)
    assert torch.equal(verification.fingerprint(whole), taken)


@pytest.mark.parametrize(
    ("gathered", "message"),
    [
        (torch.empty(0), "has 6 nonzero numbers on the processes, but 0 after gathering"),
        (torch.tensor([1.0, 2, 3, 0, 0, 0]), "has 6 nonzero numbers on the processes, but 3 after gathering"),
        (torch.tensor([4.0, 5, 6, 1, 2, 3]), "the gathered values of .* differ from those on the processes"),
        (torch.tensor([1.0, 2, 3, 4, 5, 6]).bfloat16(), "the gathered values of .* differ from those on the processes"),
    ],
)
def test_what_is_not_gathered_from_all_processes_as_they_hold_it_is_refused(tmp_path, gathered, message):
    held = torch.tensor([1.0, 2, 3, 4, 5, 6])
    halves = verification.fingerprint(held[:3]) + verification.fingerprint(held[3:], 3)
    verification.check_gathered(tmp_path / "file", {NAME: held}, {NAME: halves.tolist()})
    with pytest.raises(LayerselError, match=message) as caught:
        verification.check_gathered(tmp_path / "file", {NAME: gathered}, {NAME: halves.tolist()})
    assert str(tmp_path / "file") in str(caught.value) and NAME in str(caught.value)


def test_weights_that_are_no_numbers_are_refused_with_their_name(tmp_path):
    broken = torch.tensor([1.0, float("nan")])
    held = {NAME: verification.fingerprint(broken).tolist()}
    with pytest.raises(LayerselError, match=f"{NAME} holds NaN or infinite numbers. It was not kept"):
        verification.check_gathered(tmp_path / "file", {NAME: broken}, held)


def shift_one(tensors: dict, name: str = NAME) -> dict:
    return {**tensors, name: tensors[name] + 1e-6}


CORRUPTIONS = [
    (zero_one, f"{NAME} contains only zeros"),
    (leave_one_out, f"{NAME} is missing"),
    (lambda tensors: {**tensors, "other": torch.ones(1)}, "other does not belong there"),
    (spoil_one, f"{NAME} holds NaN or infinite numbers"),
    (round_one, f"{NAME} has dtype torch.bfloat16, not torch.float32"),
    (lambda tensors: {**tensors, NAME: tensors[NAME][:1].clone()}, f"{NAME} has shape \\(1, 2\\), not"),
    (shift_one, f"{NAME} has other values"),
]


@pytest.mark.parametrize(("corrupt", "message"), CORRUPTIONS)
def test_a_file_that_reads_back_wrong_never_takes_the_place_of_a_good_one(tmp_path, monkeypatch, corrupt, message):
    tensors = {NAME: torch.randn(4, 2), NAME.replace("_B", "_A"): torch.randn(2, 3)}
    layouts.write_adapter(tmp_path, tensors, LoraConfig(target_modules=["proj"]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == tensors.keys()

    monkeypatch.setattr(
        tensors_file, "save_file", lambda content, *args, **kwargs: save_file(corrupt(content), *args, **kwargs)
    )
    with pytest.raises(LayerselError, match=f"adapter_model.safetensors: {message}.*was not kept"):
        layouts.write_adapter(tmp_path, tensors, LoraConfig(target_modules=["proj"]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_truncated_file_and_a_configuration_cut_short_are_refused(tmp_path, monkeypatch):
    tensors = {NAME: torch.randn(4, 2)}

    def cut(content, path, **kwargs):
        save_file(content, path, **kwargs)
        path.write_bytes(path.read_bytes()[:-3])

    with monkeypatch.context() as patched, pytest.raises(LayerselError, match="safetensors: it cannot be read back"):
        patched.setattr(tensors_file, "save_file", cut)
        layouts.write_adapter(tmp_path, tensors, LoraConfig())
    for text in ("", "{}"):

        class Forgetful(LoraConfig):
            def save_pretrained(self, folder, **kwargs):
                super().save_pretrained(folder, **kwargs)
                (Path(folder) / "adapter_config.json").write_text(text)  # noqa: B023

        with pytest.raises(LayerselError, match=r"adapter_config.json: it (cannot be read back|does not read back)"):
            layouts.write_adapter(tmp_path, tensors, Forgetful())
    assert not list(tmp_path.iterdir())


@given(st.integers(1, 6), st.integers(0, 2**31), st.floats(1e-3, 50), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rounding_alone_is_allowed_in_what_a_module_adds(rank, seed, scaling, dtype):
    generator = torch.Generator().manual_seed(seed)
    live = Factors(
        torch.randn(rank, 40, generator=generator).to(dtype), torch.randn(30, rank, generator=generator).to(dtype)
    )
    gates = torch.rand(rank, generator=generator) / 2  # far from 1, which they would be left out as
    stored = fold(live, scaling, gates)
    path = Path("file")
    verification.check_update(path, "proj", live, scaling, gates, stored, 1.0)
    verification.check_update(path, "proj", live, scaling, None, live, scaling)
    for wrong, factor in [
        (stored, 1.05),
        (fold(live, scaling), 1.0),
        # Not A with its columns moved, which now and then adds the same to the one input within bf16's rounding.
        (Factors(-live.down, stored.up), 1),
    ]:
        with pytest.raises(LayerselError, match=r"LoRA output of proj would differ by up to .*; rounding explains"):
            verification.check_update(path, "proj", live, scaling, gates, wrong, factor)


def test_sets_are_written_in_order():
    config = LoraConfig(target_modules=["v", "q", "k"], exclude_modules=["b", "a"])
    kept = copy.copy(config)
    layouts.sort_sets(config)
    assert config.target_modules == ["k", "q", "v"] and config.exclude_modules == ["a", "b"]
    assert kept.target_modules == {"k", "q", "v"}
