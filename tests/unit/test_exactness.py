"""The comparison of two states finds them equal bit for bit, or names the place where they differ."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from jobs.verify_resume.exactness import Difference, count_tensors, differences, digest

NAN, INF = math.nan, math.inf


def state() -> dict[str, Any]:
    return {
        "epochs": 3,
        "model": OrderedDict({"0.weight": torch.arange(6.0).view(2, 3), "0.bias": torch.tensor([NAN, -0.0])}),
        "optimizer": {"state": {0: {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "rng": {"python": (3, [1, 2], None), "numpy": np.arange(4, dtype=np.uint32)},
    }


def test_a_state_is_the_same_as_its_copy() -> None:
    assert not list(differences(state(), copy.deepcopy(state())))
    assert count_tensors(state()) == 4


@pytest.mark.parametrize(
    ("expected", "found", "difference"),
    [
        pytest.param(
            {"model": {"0.weight": torch.tensor([1.0, 2.0, 3.0])}},
            {"model": {"0.weight": torch.tensor([1.0, 2.125, 3.25])}},
            Difference("model.0.weight", "value", "3.0 (value 2 of 3)", "3.25", 0.25),
            id="values of a tensor, the largest difference of them",
        ),
        pytest.param(
            {"state": {0: {"step": torch.tensor(4)}}},
            {"state": {0: {"step": torch.tensor(6)}}},
            Difference("state[0].step", "value", "4.0", "6.0", 2.0),
            id="a tensor of one whole number, under a number as key",
        ),
        pytest.param(torch.zeros(2), torch.zeros(3), Difference("", "shape", "(2,)", "(3,)"), id="shapes"),
        pytest.param(torch.zeros(2, 3), torch.zeros(3, 2), Difference("", "shape", "(2, 3)", "(3, 2)"), id="a turn"),
        pytest.param(
            torch.zeros(2),
            torch.zeros(2, dtype=torch.float64),
            Difference("", "dtype", "torch.float32", "torch.float64"),
            id="dtypes",
        ),
        pytest.param(
            torch.tensor([1.0, NAN]),
            torch.tensor([1.0, 2.0]),
            Difference("", "value", "nan (value 1 of 2)", "2.0", INF),
            id="NaN and a number",
        ),
        pytest.param(
            torch.tensor([5.0, 0.0]),
            torch.tensor([5.0, -0.0]),
            Difference("", "value", "0.0 (value 1 of 2)", "-0.0", 0.0),
            id="zeros of two signs",
        ),
        pytest.param(
            torch.tensor([1 + 1j]),
            torch.tensor([1 + 3j]),
            Difference("", "value", "(1+1j) (value 0 of 1)", "(1+3j)", 2.0),
            id="complex numbers",
        ),
        pytest.param(
            np.array([1, 2], dtype=np.uint32),
            np.array([1, 9], dtype=np.uint32),
            Difference("", "value", "2.0 (value 1 of 2)", "9.0", 7.0),
            id="arrays",
        ),
        pytest.param(
            np.zeros(2, dtype=np.int32), np.zeros(2), Difference("", "dtype", "int32", "float64"), id="dtypes of arrays"
        ),
        pytest.param({"lr": 0.1}, {"lr": 0.2}, Difference("lr", "value", "0.1", "0.2", 0.1), id="numbers"),
        pytest.param({"lr": 0.0}, {"lr": -0.0}, Difference("lr", "value", "0.0", "-0.0", 0.0), id="zeros"),
        pytest.param({"on": True}, {"on": 1}, Difference("on", "type", "bool", "int"), id="true and one"),
        pytest.param({"on": True}, {"on": False}, Difference("on", "value", "True", "False"), id="true and false"),
        pytest.param(("a", "b"), ("a", "c"), Difference("[1]", "value", "'b'", "'c'"), id="words"),
        pytest.param([1], [1, 2], Difference("", "length", "1", "2"), id="lengths"),
        pytest.param([1], (1,), Difference("", "type", "list", "tuple"), id="a list and a tuple"),
        pytest.param({"a": None}, {"a": 0}, Difference("a", "type", "NoneType", "int"), id="nothing and zero"),
        pytest.param(
            {"a": {"x": 1, "y": 2}},
            {"a": {"x": 1}},
            Difference("a", "keys", "also 'y'", "also nothing"),
            id="a key that was lost",
        ),
        pytest.param({}, {"z": 1}, Difference("", "keys", "no more", "also 'z'"), id="a key that is new"),
    ],
)
def test_a_difference_is_named_with_its_place_and_its_size(expected: Any, found: Any, difference: Difference) -> None:
    assert next(differences(expected, found)) == difference


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([NAN, INF, -INF, -0.0]),
        torch.tensor([], dtype=torch.float16),
        torch.tensor([True, False]),
        torch.arange(4).to(torch.bfloat16),
        torch.eye(3).to_sparse(),
        torch.tensor([1 + 1j]).conj(),
        torch.arange(6.0).view(2, 3).t(),
        np.array([NAN, 1.0]),
        np.array(["a", "b"]),
        NAN,
        complex(NAN, -0.0),
        None,
        b"bytes",
        {1, 2},
    ],
    ids=repr,
)
def test_copies_have_no_differences_and_the_same_digest(value: Any) -> None:
    again = copy.deepcopy(value)
    assert not list(differences({"at": value}, {"at": again}))
    assert digest({"at": value}) == digest({"at": again})


def test_memory_layout_and_subclasses_do_not_count() -> None:
    turned = torch.arange(6.0).view(2, 3).t()
    assert not list(differences(turned, turned.contiguous()))
    assert digest(turned) == digest(turned.contiguous())
    narrow = torch.ones(3, 8, 1, 1).to(memory_format=torch.channels_last)  # contiguous, with unusual strides
    assert not list(differences(narrow, torch.ones(3, 8, 1, 1)))
    assert digest(narrow) == digest(torch.ones(3, 8, 1, 1))
    assert not list(differences(nn.Parameter(torch.ones(2)), torch.ones(2)))
    assert not list(differences(OrderedDict(a=1, b=2), {"b": 2, "a": 1}))


def test_all_differences_are_listed_in_the_order_of_the_expected_state() -> None:
    changed = state()
    changed["rng"]["python"] = (3, [1, 5], None)
    changed["model"]["0.weight"][1, 2] += 1
    changed["optimizer"]["param_groups"][0]["lr"] = 0.2
    found = list(differences(state(), changed))
    assert [d.path for d in found] == ["model.0.weight", "optimizer.param_groups[0].lr", "rng.python[1][1]"]
    assert found[0] == Difference("model.0.weight", "value", "5.0 (value 5 of 6)", "6.0", 1.0)


@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8]),
    data=st.data(),
)
def test_any_flipped_bit_is_a_difference(shape: list[int], dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = torch.zeros(shape, dtype=dtype)
    flipped = tensor.clone()
    raw = flipped.view(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert [difference.path for difference in differences({"t": tensor}, {"t": flipped})] == ["t"]
    assert digest(tensor) != digest(flipped)
