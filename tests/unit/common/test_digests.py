"""Digests of files, JSON and tensors."""

import hashlib

import pytest
import torch

from axolotl_layersel.common import digests


def test_a_file_has_the_digest_of_its_content_however_large_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "PIECE", 3)
    (tmp_path / "file").write_bytes(b"ten bytes!")
    assert digests.hash_file(tmp_path / "file") == hashlib.sha256(b"ten bytes!").hexdigest()


def test_json_has_one_digest_in_any_order_of_keys():
    assert digests.hash_json({"a": 1, "b": [2]}) == digests.hash_json({"b": [2], "a": 1})
    assert digests.hash_json({"a": 1}) != digests.hash_json({"a": 2})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_a_tensor_has_the_digest_of_its_values_however_they_lie_in_memory(dtype):
    tensor = torch.arange(12).view(3, 4).to(dtype)
    assert digests.hash_tensor(tensor.T.contiguous().T) == digests.hash_tensor(tensor)
    assert digests.hash_tensor(tensor[0, 0]) == hashlib.sha256(bytes(tensor.itemsize)).hexdigest()


def test_tensors_differ_by_name_type_shape_values_and_metadata():
    tensors = {"a": torch.zeros(2), "b": torch.ones(2)}
    first = digests.hash_tensors(tensors, {"step": "1"})
    assert digests.hash_tensors(dict(reversed(tensors.items())), {"step": "1"}) == first
    others = [
        ({"a": torch.zeros(2), "c": torch.ones(2)}, {"step": "1"}),
        ({"a": torch.zeros(2, dtype=torch.int32), "b": torch.ones(2)}, {"step": "1"}),
        ({"a": torch.zeros(2, 1), "b": torch.ones(2)}, {"step": "1"}),
        ({"a": torch.zeros(2), "b": -torch.ones(2)}, {"step": "1"}),
        (tensors, {"step": "2"}),
    ]
    assert len({first, *(digests.hash_tensors(*other) for other in others)}) == 6
