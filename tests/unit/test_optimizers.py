"""A profile's optimizer: one of torch's or a user's own, with the profile's hyperparameters, and with fused kernels if
torch has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.errors import JobError
from jobs.optim import optimizers
from orchestrator.profile import Profile


def profile(optimizer: str | None = None, momentum: float = 0.9, weight_decay: float = 0.01, **options: Any) -> Profile:
    return Profile("one", 0.1, momentum, weight_decay, optimizer, options)


def parameters(count: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(torch.arange(6.0).reshape(2, 3) + i) for i in range(count)]


def group(optimizer: torch.optim.Optimizer, number: int = 0) -> dict[str, Any]:
    return {key: value for key, value in optimizer.param_groups[number].items() if key != "params"}


class Doubling(torch.optim.SGD):
    """A user's own optimizer."""


class NoOptimizer:
    pass


OWN = f"{__name__}:Doubling"


@pytest.mark.parametrize(
    ("given", "kind", "numbers"),
    [
        (profile(), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": False}),
        (profile("SGD", nesterov=True), torch.optim.SGD, {"nesterov": True, "momentum": 0.9}),
        (profile("Adam", momentum=0.8), torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.999), "weight_decay": 0.01}),
        (profile("AdamW", betas=[0.7, 0.9]), torch.optim.AdamW, {"betas": (0.7, 0.9), "weight_decay": 0.01}),
        (profile("AdamW", weight_decay=0.0), torch.optim.AdamW, {"weight_decay": 0.0}),
        (profile("RMSprop", alpha=0.5), torch.optim.RMSprop, {"alpha": 0.5, "momentum": 0.9}),
        (profile("Adagrad"), torch.optim.Adagrad, {"lr": 0.1, "weight_decay": 0.01}),
        (profile(OWN), Doubling, {"lr": 0.1, "momentum": 0.9}),
    ],
    ids=lambda value: value.optimizer or "the default" if isinstance(value, Profile) else "",
)
def test_a_profile_gives_its_numbers_to_its_optimizer(given: Profile, kind: type, numbers: Mapping[str, Any]) -> None:
    made = optimizers.make(given, parameters())
    assert type(made) is kind
    assert numbers.items() <= group(made).items()


def test_a_profile_without_an_optimizer_gets_sgd() -> None:
    assert type(optimizers.make(profile(), parameters())) is torch.optim.SGD


def test_factors_of_a_group_multiply_the_profiles_numbers() -> None:
    one, two = parameters()
    groups = [{"params": [one], "lr_factor": 0.1, "weight_decay_factor": 0}, {"params": [two]}]
    for rate in (1.0, 0.5):
        made = optimizers.make(Profile("one", rate, 0.9, 0.01), groups)
        assert [(g["lr"], g["weight_decay"]) for g in made.param_groups] == [(0.1 * rate, 0), (rate, 0.01)]


def test_parameters_without_gradients_and_empty_groups_are_left_out() -> None:
    frozen, trained = parameters()
    frozen.requires_grad_(False)
    assert [g["params"] for g in optimizers.make(profile(), [frozen, trained]).param_groups] == [[trained]]
    made = optimizers.make(profile(), [{"params": [frozen]}, {"params": [trained], "lr_factor": 2}])
    assert [g["lr"] for g in made.param_groups] == [0.2]
    with pytest.raises(JobError, match="no parameter of the model requires a gradient"):
        optimizers.make(profile(), [frozen])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (profile("Adm"), r"profile 'one': optimizer Adm: torch has no .*did you mean 'Adam'"),
        (profile("Xyz"), r"optimizer Xyz: torch has no .*allowed: ASGD, .*SGD.*\"package.module:Class\""),
        (
            profile("LBFGS"),
            r"optimizer LBFGS: it calls the model several times per step.*train_chunk.*own-job",
        ),
        (profile("lbfgs"), r"optimizer lbfgs: it calls the model several times per step"),
        (profile("torch.optim:LBFGS"), r"optimizer torch.optim:LBFGS: it calls the model several times per step"),
        (profile("Optimizer"), r"optimizer Optimizer: torch has no suitable"),
        (profile("no_such_module:A"), r"no_such_module can't be imported: ModuleNotFoundError"),
        (profile(f"{__name__}:NoOptimizer"), r"no class NoOptimizer that is derived from torch's Optimizer"),
        (profile("SGD", nestrov=True), r"optimizer SGD: it has no option 'nestrov'; did you mean 'nesterov'\?"),
        (profile("Adam", xyz=1), r"optimizer Adam: it has no option 'xyz'; allowed: .*betas.*eps"),
        (profile("SGD", momentum=0.0, nesterov=True), r"optimizer SGD: Nesterov momentum requires a momentum"),
        (profile("Adam", betas=[2, 0.9]), r"optimizer Adam: Invalid beta parameter at index 0: 2"),
        (profile("Adam", betas=[0.9]), r"optimizer Adam: .*\(given: .*\"betas\": \[0.9\]"),
        (profile("adamw"), r"optimizer adamw: .*did you mean 'AdamW'"),
        (profile("Rprop"), r"weight_decay: 0.01, but the optimizer Rprop does not support it"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value.optimizer} {dict(value.optimizer_options) or ''}",
)
def test_a_mistake_is_one_clear_error(given: Profile, message: str) -> None:
    with pytest.raises(JobError, match=message) as raised:
        optimizers.check_optimizer(given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("option", ["lr", "momentum", "weight_decay"])
def test_the_profiles_own_numbers_are_not_options(option: str) -> None:
    with pytest.raises(JobError, match=f"it has no option {option!r}"):
        optimizers.check_optimizer(Profile("p", 0.1, 0.9, 0.0, "SGD", {option: 0.5}))


# --- steps


def train(optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[Tensor]:
    """Make steps with gradients that depend on the step's number."""
    given = [p for g in optimizer.param_groups for p in g["params"]]
    for step in range(first, first + steps):
        for number, parameter in enumerate(given):
            parameter.grad = torch.full_like(parameter, 1.0 + step + number)
        optimizer.step()
    return [p.detach().clone() for p in given]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_fused_kernels_are_used_unless_the_options_say_otherwise(name: str) -> None:
    assert group(optimizers.make(profile(name), parameters()))["fused"] is True
    assert not group(optimizers.make(profile(name, fused=False), parameters()))["fused"]
    assert not group(optimizers.make(profile(name, foreach=True), parameters()))["fused"]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_other_kernels_are_used_where_torch_has_no_fused_ones(name: str) -> None:
    for of_kind in ({"dtype": torch.complex64}, {"device": "meta"}):
        made = optimizers.make(profile(name), [nn.Parameter(torch.zeros(2, 3, **of_kind))])
        assert not group(made)["fused"]
        assert len(train(made, 1)) == 1


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.5}], ids=str)
def test_sgd_makes_the_same_steps_as_torchs_own(options: dict[str, Any]) -> None:
    plain = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, foreach=False, **options)
    made = optimizers.make(profile("SGD", **options), parameters())
    for ours, theirs in zip(train(made, 4), train(plain, 4), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_fused_step_trains_a_parameter_whose_first_gradient_comes_late() -> None:
    early, late = parameters()
    made = optimizers.make(profile(), [early, late])
    early.grad = torch.ones_like(early)
    made.step()
    assert torch.equal(late, parameters()[1])
    early.grad, late.grad = torch.ones_like(early), torch.ones_like(late)
    made.step()
    assert not torch.equal(late, parameters()[1])


# --- another profile takes over


def taken_over(old: Profile, new: Profile) -> tuple[bool, torch.optim.Optimizer, dict[str, Any]]:
    before = optimizers.make(old, parameters())
    train(before, 2)
    after = optimizers.make(new, parameters())
    kept = optimizers.take_over(after, before.state_dict(), optimizers.class_name(before))
    return kept, after, before.state_dict()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (profile("SGD"), profile("SGD", momentum=0.5)),
        (profile("SGD"), profile("SGD", momentum=0.0)),
        (profile("SGD"), profile("SGD", nesterov=True)),
        (profile(None), profile("SGD", weight_decay=0.0)),
        (profile("Adam", weight_decay=0.0), profile("Adam", weight_decay=0.1, momentum=0.1)),
        (profile("Adam", amsgrad=True), profile("Adam")),
    ],
    ids=["SGD", "SGD without momentum", "SGD with nesterov", "SGD by default", "Adam", "Adam without amsgrad"],
)
def test_the_same_class_keeps_its_state_under_the_new_numbers(old: Profile, new: Profile) -> None:
    kept, after, before = taken_over(old, new)
    assert kept
    for number, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(after.state_dict()["state"][number][name], value), name
    assert group(after) == group(optimizers.make(new, parameters()))
    assert all(tensor.isfinite().all() for tensor in train(after, 2, first=2))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (profile("SGD"), profile("Adam")),
        (profile("Adam"), profile("AdamW")),
        (profile("SGD"), profile(OWN)),
        (profile("Adam"), profile("Adam", amsgrad=True)),
        (profile("RMSprop", momentum=0.0), profile("RMSprop")),
        (profile("RMSprop"), profile("RMSprop", centered=True)),
    ],
    ids=["another", "a relative", "a derived one", "amsgrad is new", "momentum is new", "centered is new"],
)
def test_another_class_or_new_state_begins_from_nothing(old: Profile, new: Profile) -> None:
    kept, after, _ = taken_over(old, new)
    assert not kept
    fresh = optimizers.make(new, parameters())
    for ours, theirs in zip(train(after, 3), train(fresh, 3), strict=True):
        assert torch.equal(ours, theirs)


def test_other_parameter_groups_begin_from_nothing() -> None:
    one, two = parameters()
    before = optimizers.make(profile(), [one, two])
    train(before, 1)
    after = optimizers.make(profile(), [{"params": [one]}, {"params": [two]}])
    assert not optimizers.take_over(after, before.state_dict(), optimizers.class_name(before))
