"""DavidNet's layers: their shapes, and what each trick changes in them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from jobs.davidnet import GhostBatchNorm, PatchWhitening, Pool, batch_norm, network, whitening_filters

FULL = (64, 128, 256, 512)
NARROW = (4, 6, 8, 10)
TRICKS: list[dict[str, Any]] = [
    {},
    {"pool": "before_activation"},
    {"pool": "before_norm"},
    {"activation": partial(nn.CELU, 0.3)},
    {"norm": partial(batch_norm, ghost_batch=4)},
    {"norm": partial(batch_norm, frozen_scale=0.25)},
    {"whitening": True},
    {
        "pool": "before_norm",
        "activation": partial(nn.CELU, 0.3),
        "norm": partial(batch_norm, ghost_batch=4, frozen_scale=1.0),
        "whitening": True,
        "scale": 1 / 16,
    },
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def images(count: int, side: int = 32) -> Tensor:
    """Random smooth images: neighbouring pixels are similar, as in photographs."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(count, 3, side // 4, side // 4, generator=generator)
    fine = torch.randn(count, 3, side, side, generator=generator)
    return functional.interpolate(coarse, size=side, mode="bilinear") + 0.1 * fine


# --- the network


def test_the_network_has_pages_nine_layers_and_parameters() -> None:
    net = network(FULL)
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == 9
    assert sum(p.numel() for p in net.parameters()) == 6_573_120  # of the network in the author's code
    assert all(layer.bias is None for layer in layers)
    assert [tuple(layer.weight.shape[:2]) for layer in layers] == [
        *((64, 3), (128, 64), (128, 128), (128, 128)),
        *((256, 128), (512, 256), (512, 512), (512, 512), (10, 512)),
    ]


@pytest.mark.parametrize("tricks", TRICKS)
def test_every_network_gives_one_logit_per_class_and_trains_all_that_is_not_frozen(tricks: dict[str, Any]) -> None:
    net = network(NARROW, **tricks, classes=7)
    for module in net.modules():
        if isinstance(module, PatchWhitening):
            module.set_filters(torch.randn(27, 3, 3, 3))
    logits = net(images(8))
    assert logits.shape == (8, 7)
    functional.cross_entropy(logits, torch.arange(8) % 7).backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad and not name.endswith("bias"):
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("tricks", TRICKS)
def test_every_network_keeps_bf16_and_channels_last(tricks: dict[str, Any]) -> None:
    net = network(NARROW, **tricks).to(memory_format=torch.channels_last)
    seen: list[tuple[str, torch.dtype, bool]] = []

    def look(name: str, output: Tensor) -> None:
        seen.append((name, output.dtype, output.is_contiguous(memory_format=torch.channels_last)))

    for name, module in net.named_modules():
        if name.split(".")[0] in ("prep", "layer1", "layer2", "layer3") and name:
            module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
    with torch.autocast("cpu", torch.bfloat16):
        net(images(8).contiguous(memory_format=torch.channels_last)).float().sum().backward()
    assert {(dtype, last) for _, dtype, last in seen} == {(torch.bfloat16, True)}, seen
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


def test_the_logits_are_scaled() -> None:
    net, doubled = network(NARROW, scale=0.125).eval(), network(NARROW, scale=0.25).eval()
    doubled.load_state_dict(net.state_dict())
    torch.testing.assert_close(2 * net(images(2)), doubled(images(2)))


def test_logits_are_not_rounded_to_bf16() -> None:
    net = network(NARROW).eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(images(32))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_a_residual_adds_the_output_of_two_blocks_to_its_input() -> None:
    residual = network(NARROW).layer1.residual.eval()
    inputs = torch.randn(2, NARROW[1], 8, 8)
    first, second = residual.layers
    torch.testing.assert_close(residual(inputs), inputs + second(first(inputs)))


# --- the order of max-pool


@pytest.mark.parametrize(
    ("pool", "order"),
    [
        ("after_activation", ["conv", "norm", "act", "pool"]),
        ("before_activation", ["conv", "norm", "pool", "act"]),
        ("before_norm", ["conv", "pool", "norm", "act"]),
    ],
)
def test_max_pool_is_in_the_chosen_place(pool: Pool, order: list[str]) -> None:
    net = network(NARROW, pool=pool)
    for layer in (net.layer1, net.layer2, net.layer3):
        assert [name for name, _ in layer.named_children()][:4] == order


@pytest.mark.parametrize("activation", [nn.ReLU, partial(nn.CELU, 0.3)])
def test_pooling_changes_the_output_before_norm_but_not_before_the_activation(
    activation: Any,
) -> None:
    after, before, earliest = (
        network(NARROW, pool=pool, activation=activation)
        for pool in ("after_activation", "before_activation", "before_norm")
    )
    before.load_state_dict(after.state_dict())
    earliest.load_state_dict(after.state_dict())
    batch = images(4)
    wanted = after(batch)
    torch.testing.assert_close(before(batch), wanted)
    assert not torch.allclose(earliest(batch), wanted, rtol=0.01)


# --- ghost batch norm


@settings(deadline=None, max_examples=60)
@given(count=st.integers(2, 40), ghost=st.integers(2, 12), last=st.booleans())
def test_every_ghost_batch_is_normalised_separately(count: int, ghost: int, last: bool) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    inputs = torch.randn(count, 3, 5, 4).mul(3).add(1).contiguous(memory_format=layout).requires_grad_()
    norm, plain = GhostBatchNorm(3, ghost), nn.BatchNorm2d(3)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    plain.load_state_dict(norm.state_dict())
    output = norm(inputs)
    assert output.is_contiguous(memory_format=layout)

    groups = max(1, count // ghost)
    if count % groups == 0:
        members = [torch.arange(first, count, groups) for first in range(groups)]
    else:
        border = (groups - 1) * ghost
        members = [torch.arange(first, border, groups - 1) for first in range(groups - 1)]
        members.append(torch.arange(border, count))
    assert all(len(group) >= min(ghost, count) for group in members)
    means, variances = [], []
    wanted = torch.empty_like(output)
    for group in members:
        one = copy.deepcopy(plain)
        wanted[group] = one(inputs[group])
        means.append(one.running_mean)
        variances.append(one.running_var)
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))
    assert norm.num_batches_tracked == 1

    weights = torch.randn_like(output)
    (gradient,) = torch.autograd.grad((wanted * weights).sum(), inputs)
    ((output * weights).sum()).backward()
    torch.testing.assert_close(inputs.grad, gradient, atol=1e-4, rtol=1e-4)


def test_ghost_batch_norm_evaluates_as_batch_norm_and_has_its_state() -> None:
    norm, plain = GhostBatchNorm(3, 4), nn.BatchNorm2d(3)
    norm(torch.randn(8, 3, 4, 4))
    plain.load_state_dict(norm.state_dict())
    inputs = torch.randn(5, 3, 4, 4)
    assert torch.equal(norm.eval()(inputs), plain.eval()(inputs))


def test_a_batch_no_larger_than_a_ghost_batch_is_normalised_as_a_whole() -> None:
    norm, plain = GhostBatchNorm(3, 32), nn.BatchNorm2d(3)
    inputs = torch.randn(32, 3, 4, 4)
    torch.testing.assert_close(norm(inputs), plain(inputs))
    torch.testing.assert_close(norm.running_var, plain.running_var)


# --- frozen scales


@pytest.mark.parametrize("ghost_batch", [None, 4])
def test_a_frozen_scale_is_that_constant_and_is_not_trained(ghost_batch: int | None) -> None:
    norm = batch_norm(3, ghost_batch, frozen_scale=0.25)
    assert isinstance(norm, GhostBatchNorm) == (ghost_batch is not None)
    output = norm(torch.randn(16, 3, 8, 8))
    assert output.std().item() == pytest.approx(0.25, rel=0.02)
    output.square().sum().backward()
    assert norm.weight.grad is None
    assert norm.bias.grad is not None
    assert torch.equal(norm.state_dict()["weight"], torch.full((3,), 0.25))  # so a checkpoint contains the scale


# --- whitening


def patches_of(pictures: Tensor) -> Tensor:
    return functional.unfold(pictures, 3).transpose(0, 1).reshape(27, -1)


def test_whitened_patches_are_uncorrelated_and_of_one_scale() -> None:
    pictures = images(700)  # processed in seven parts of 100
    filters = whitening_filters(pictures, epsilon=1e-9)
    assert filters.shape == (27, 3, 3, 3)
    before, after = torch.cov(patches_of(pictures)), torch.cov(filters.view(27, 27) @ patches_of(pictures))
    assert (before - before.diag().diag()).abs().max() > 0.3
    torch.testing.assert_close(after, torch.eye(27), atol=0.01, rtol=0)


def test_directions_with_little_variance_are_not_amplified() -> None:
    pictures = images(100)
    filters = whitening_filters(pictures, epsilon=0.01).view(27, 27)
    values = torch.linalg.eigvalsh(torch.cov(patches_of(pictures))).flip(0)
    variances = torch.cov(filters @ patches_of(pictures)).diag()
    torch.testing.assert_close(variances, values / (values + 0.01), atol=0.001, rtol=0.01)
    assert (values.diff() <= 0).all()  # the largest first
    norms = filters.norm(dim=1)
    assert (norms.diff() > -1e-4).all()


def test_a_filters_sign_does_not_depend_on_the_library() -> None:
    filters = whitening_filters(images(50)).view(27, 27)
    largest = filters.gather(1, filters.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_the_whitening_layer_is_frozen_and_part_of_the_state() -> None:
    net = network(NARROW, whitening=True)
    layer = net.prep.whitening
    assert isinstance(layer, PatchWhitening)
    assert not layer.weight.requires_grad
    assert layer.weight.count_nonzero() == 0
    filters = whitening_filters(images(50))
    layer.set_filters(filters)
    again = network(NARROW, whitening=True)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.prep.whitening.weight, filters)
    assert net.prep.conv.weight.shape == (NARROW[0], 27, 1, 1)
    pictures = images(3)
    torch.testing.assert_close(layer(pictures), functional.conv2d(pictures, filters, padding=1))
