"""The names of weights lose the prefixes that torch.compile, DataParallel and DDP put before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from jobs.training.states import unwrapped


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


class Named(nn.Module):
    """A model with a layer that is itself called module."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 3)
        self.backbone = nn.ModuleDict({"module": network(), "head": nn.Linear(3, 1)})


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")  # inductor, which is slow to import, gives the same names


def compiled_inside(model: nn.Sequential) -> nn.Module:
    model[0] = compiled(model[0])  # type: ignore[assignment]
    return model


WRAPPED = {
    "as it is": lambda: network(),
    "compiled": lambda: compiled(network()),
    "parallel": lambda: nn.DataParallel(network()),
    "both": lambda: nn.DataParallel(compiled(network())),
    "both, the other way": lambda: compiled(nn.DataParallel(network())),
    "a layer": lambda: compiled_inside(network()),
    "a layer and all": lambda: nn.DataParallel(compiled_inside(network())),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_of_a_wrapped_model_fit_the_model(kind: str, known: bool) -> None:
    wrapped = WRAPPED[kind]().state_dict()
    plain = unwrapped(wrapped, network().state_dict().keys() if known else None)
    assert list(plain) == list(network().state_dict())
    assert all(value is plain[name] for name, value in zip(plain, wrapped.values(), strict=True))
    network().load_state_dict(plain)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, compiled])
def test_a_layer_that_is_called_module_keeps_its_name(wrap: Any) -> None:
    plain = unwrapped(wrap(Named()).state_dict(), Named().state_dict().keys())
    Named().load_state_dict(plain)


@pytest.mark.parametrize(
    "state",
    [
        {"module.a": 1, "a": 2},
        {"fc._orig_mod.bias": 1, "fc.bias": 2},
        {"a": 1, "b.module": 2},
        {1: 2, ("module", "x"): 3},
        {},
    ],
)
def test_names_that_would_collide_or_have_no_prefix_stay(state: Mapping[Any, int]) -> None:
    assert unwrapped(state) == state


def test_very_many_prefixes_are_removed_quickly() -> None:
    assert unwrapped({"module." * 200 + "a": 1}, ["b"]) == {"a": 1}
