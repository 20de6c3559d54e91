"""Headers of safetensors files, read by hand and by safetensors."""

from __future__ import annotations

import random

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qlora_neft.base.model_files import StoredTensor, _plain_header, stored_tensors


def by_safetensors(path):
    with safe_open(path, "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is not a dictionary)
        return {name: StoredTensor(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


@pytest.fixture
def path(tmp_path):
    arrays = {"z": np.zeros((2, 3), "f4"), "a10": np.zeros(5, "i8"), "a2": np.zeros(0, "f2"), "é": np.zeros((), "f8")}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    return tmp_path / "x.safetensors"


def test_a_header_read_by_hand_is_that_of_safetensors_in_the_same_order(path):
    assert list(_plain_header(path).items()) == list(by_safetensors(path).items())


def test_a_damaged_header_is_never_taken_for_a_whole_one(path):
    whole, dice = path.read_bytes(), random.Random(0)
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] = dice.randrange(256)
        path.write_bytes(damaged)
        found = _plain_header(path)
        assert found is None or list(found.items()) == list(by_safetensors(path).items()), bytes(damaged)


@pytest.mark.parametrize("length", [0, 4, 8, 20, -1])
def test_a_file_that_is_cut_off_is_refused_in_the_words_of_safetensors(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SafetensorError, match="Error while deserializing header"):
        stored_tensors(path)
