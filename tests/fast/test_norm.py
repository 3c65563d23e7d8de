"""Batch norm and ReLU in one pass agree with plain autograd in float64; nothing else about a model changes."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from finetune101.config import SystemConfig
from finetune101.fast import fast_layers, kernels
from finetune101.fast.norm import DoneReLU6, FastBatchNorm2d, fast_norm
from finetune101.machine import detect

pytestmark = pytest.mark.skipif(kernels.compiled() is None, reason="needs Linux and gcc")
has_bf16 = detect(SystemConfig(device="cpu")).precision == "bf16"
ACTS = [nn.Identity, nn.ReLU, nn.ReLU6]


def layers(channels: int, act: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, -1, 3)
    nn.init.normal_(norm.bias, 1)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return nn.Sequential(norm, act())


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    x = x.clone().requires_grad_()
    out = model(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(out.dtype)
    out.backward(grad)
    return out.detach(), [p.grad for p in (x, *model.parameters())]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.004), (torch.float32, 1e-5)])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("channels", "size"), [(32, 30), (24, 17), (7, 5), (1, 3), (100, 1)])
def test_agrees_with_float64(
    act: type[nn.Module], training: bool, channels: int, size: int, dtype: torch.dtype, error: float
) -> None:
    """Rows that fill a register, several together, and remainders of each."""
    plain = layers(channels, act).train(training)
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    assert fast_norm(fast) == 1
    x = torch.randn(5, channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 + 1
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    out, grads = run(fast, x)
    expected, wanted = run(exact, x.double())
    assert out.dtype == dtype
    assert relative_error(out, expected) < error
    for got, want in zip(grads, wanted, strict=True):
        assert got is not None and want is not None
        assert relative_error(got, want) < error
    for got, want in zip(fast.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [100, 1000])
def test_a_large_mean_leaves_fp32_its_digits(ratio: int) -> None:
    plain = layers(24, nn.ReLU)
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    fast_norm(fast)
    x = (torch.randn(8, 24, 15, 15, generator=torch.Generator().manual_seed(1)) + ratio).contiguous(
        memory_format=torch.channels_last
    )
    out, grads = run(fast, x)
    (plain_out, plain_grads), (expected, wanted) = run(plain, x), run(exact, x.double())
    assert relative_error(out, expected) <= relative_error(plain_out, expected)
    for got, other, want in zip(grads, plain_grads, wanted, strict=True):
        assert got is not None and other is not None and want is not None
        assert relative_error(got, want) < 1.5 * relative_error(other, want) + 1e-4


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(64, 24, 40, 40).bfloat16().contiguous(memory_format=torch.channels_last)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            model = layers(24, nn.ReLU6)
            fast_norm(model)
            results.append(run(model, x)[1])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True) if a is not None and b is not None)


def test_a_relu_skips_only_what_was_clamped() -> None:
    model = layers(8, nn.ReLU6)
    fast_norm(model)
    norm, act = model
    assert isinstance(norm, FastBatchNorm2d) and isinstance(act, DoneReLU6)
    x = torch.randn(2, 8, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    y = norm(x)
    assert act(y) is y
    assert torch.equal(act(y - 3), nn.functional.relu6(y - 3))
    assert act(y) is not y  # the mark is used up: y could have been changed meanwhile


def test_a_norm_or_sequence_that_is_used_otherwise_keeps_its_output() -> None:
    class Taps(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = self[0](x)
            return y + self[1](y)

    plain = Taps(*layers(16, nn.ReLU))
    fast = copy.deepcopy(plain)
    fast_norm(fast)
    x = torch.randn(4, 16, 6, 6).bfloat16().contiguous(memory_format=torch.channels_last)
    assert relative_error(fast(x).detach(), plain(x.clone()).detach()) < 0.01
    hooked = layers(16, nn.ReLU)
    fast_norm(hooked)
    hooked[0].register_forward_hook(lambda module, inputs, output: output.sub_(1))
    assert hooked(x).min() == 0


def test_wrong_channels_are_refused() -> None:
    model = layers(8, nn.Identity).eval()
    fast_norm(model)
    with pytest.raises(RuntimeError, match="64"):
        model(torch.randn(2, 64, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last))


def test_not_a_number_stays_one() -> None:
    model = layers(16, nn.ReLU6).eval()
    fast_norm(model)
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # the one that rounding up would wrap
    x = torch.full((2, 16, 2, 2), float("nan")).bfloat16().contiguous(memory_format=torch.channels_last)
    assert model(x).isnan().all()
    with torch.no_grad():
        model[0].bias.copy_(nan)  # type: ignore[union-attr, operator]
    assert model(torch.zeros_like(x)).isnan().all()


def test_float64_other_layouts_and_no_grad_are_untouched() -> None:
    plain = layers(16, nn.ReLU)
    fast = copy.deepcopy(plain)
    fast_norm(fast)
    x = torch.randn(4, 16, 5, 5)
    for a, b in zip(run(fast, x)[1], run(plain, x)[1], strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    x = x.contiguous(memory_format=torch.channels_last)
    twice = [run(copy.deepcopy(model).double(), x.double())[1] for model in (fast, plain)]
    for a, b in zip(*twice, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(fast.eval()(x.bfloat16()), plain.eval()(x.bfloat16()))


@pytest.mark.parametrize(
    "bf16",
    [
        False,
        pytest.param(True, marks=pytest.mark.skipif(not has_bf16, reason="bf16 is only imitated on this processor")),
    ],
)
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenet_v2", "resnet18"])
def test_networks_keep_their_names_and_their_gradients(name: str, bf16: bool) -> None:
    torch.manual_seed(0)
    zoo = timm.create_model if "lite" in name else torchvision.models.get_model
    plain = zoo(name, num_classes=5).to(memory_format=torch.channels_last)
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert fast_norm(fast) == norms
    assert fast_norm(fast) == 0
    assert list(fast.state_dict()) == list(plain.state_dict())
    x = torch.randn(8, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    outputs = []
    for model in (exact, plain, fast):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and model is not exact):
            outputs.append(model.train()(x.double() if model is exact else x).double())
            loss = nn.functional.cross_entropy(outputs[-1], torch.arange(8) % 5)
        loss.backward()
    # bf16 through sixty random layers is off by a sixth whoever computes it: ours may be no further off than PyTorch's
    plain_error = relative_error(outputs[1].detach(), outputs[0].detach())
    assert relative_error(outputs[2].detach(), outputs[0].detach()) < 1.5 * plain_error + 1e-4
    gradient = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (exact, plain, fast)]
    slack = 0.0 if bf16 else 0.02  # one activation at its clamp passes its gradient, or does not
    assert relative_error(gradient[2], gradient[0]) < 1.2 * relative_error(gradient[1], gradient[0]) + slack
    if "lite" in name:
        assert any(type(module).__name__ == "FastBatchNormAct2d" for module in fast.modules())


def test_without_a_compiler_nothing_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    kernels.compiled.cache_clear()
    try:
        assert kernels.compiled() is None
        assert fast_norm(layers(8, nn.ReLU)) == 0
    finally:
        kernels.compiled.cache_clear()


def block(kernel: int, stride: int, first: bool, act: type[nn.Module] = nn.ReLU6) -> nn.Sequential:
    """Batch norm, ReLU6, depthwise convolution, batch norm, ReLU6; from the convolution on where not ``first``."""
    padding = 0 if stride == 2 else kernel // 2  # Conv2dSame pads unevenly at stride 2
    kind = Conv2dSame if stride == 2 else nn.Conv2d
    torch.manual_seed(1)
    conv = kind(32, 32, kernel, stride=stride, padding=padding, groups=32, bias=False)
    nn.init.normal_(conv.weight)
    return nn.Sequential(*(layers(32, act) if first else ()), conv, *layers(32, act))


def wide(dtype: torch.dtype, size: int = 13) -> Tensor:
    x = torch.randn(5, 32, size, size + 5, generator=torch.Generator().manual_seed(1)) * 2 + 1
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def fast_block(plain: nn.Module) -> nn.Module:
    fast = copy.deepcopy(plain)
    fast_layers(fast)
    return fast


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", [13, 4])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_norms_around_a_depthwise_convolution_agree_with_float64(
    kernel: int, stride: int, training: bool, first: bool, size: int, dtype: torch.dtype, error: float
) -> None:
    act = nn.ReLU6 if dtype == torch.float32 else nn.Identity  # rounding to bf16 moves values over a clamp
    plain = block(kernel, stride, first, act).train(training)
    fast, exact = fast_block(plain), copy.deepcopy(plain).double()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out, grads = run(fast, wide(dtype, size))
    expected, wanted = run(exact, wide(dtype, size).double())
    assert "DepthwiseNorm" in type(fast(wide(torch.float32)).grad_fn).__name__
    assert relative_error(out, expected) < error
    for got, want in zip(grads, wanted, strict=True):
        assert got is not None and want is not None
        assert relative_error(got, want) < error


@pytest.mark.parametrize("frozen", [[0], [2], [3], [0, 2], [0, 2, 3], [2, 3]])
def test_frozen_layers_around_a_depthwise_convolution(frozen: list[int]) -> None:
    plain = block(3, 1, first=True)
    for number in frozen:
        plain[number].requires_grad_(False)
    fast, exact = fast_block(plain), copy.deepcopy(plain).double()
    for got, want in zip(run(fast, wide(torch.float32))[1], run(exact, wide(torch.float64))[1], strict=True):
        assert (got is None) == (want is None)
        assert got is None or want is None or relative_error(got, want) < 1e-5
    x = wide(torch.float32)
    fast.zero_grad()
    if any(p.requires_grad for p in fast.parameters()):
        fast(x).square().sum().backward()  # no gradient of x is asked for


@pytest.mark.parametrize("change", [lambda y: y.mul_(2), lambda y: y])
@pytest.mark.parametrize("where", [1, 2])
def test_what_lies_between_the_layers_may_be_changed_and_used_elsewhere(where: int, change: Any) -> None:
    """``where``: after the first batch norm, or after the convolution."""

    class Taps(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            norm, act, conv, norm2, act2 = self
            y = act(norm(x))
            y = change(y) if where == 1 else y
            z = conv(y)
            z = change(z) if where == 2 else z
            return act2(norm2(z)) + (y if where == 1 else z) * 0.5

    plain = Taps(*block(3, 1, first=True))
    fast, exact = fast_block(plain), copy.deepcopy(plain).double()
    out, grads = run(fast, wide(torch.float32))
    expected, wanted = run(exact, wide(torch.float64))
    assert relative_error(out, expected) < 1e-5
    for got, want in zip(grads, wanted, strict=True):
        assert got is not None and want is not None
        assert relative_error(got, want) < 1e-5


def test_a_hook_on_the_convolution_sees_its_gradient() -> None:
    fast, sizes = fast_block(block(3, 1, first=True)), []
    fast[2].register_full_backward_hook(lambda module, inputs, outputs: sizes.append(outputs[0].shape))
    run(fast, wide(torch.float32))
    assert sizes == [(5, 32, 13, 18)]


def test_an_input_that_changed_in_place_is_an_error_as_in_pytorch() -> None:
    norm, act, conv, norm2, _ = fast_block(block(3, 1, first=True)).train()
    y = act(norm(wide(torch.float32)))
    z = conv(y)
    y.mul_(3)
    with pytest.raises(RuntimeError, match="inplace operation"):
        norm2(z).sum().backward()


@pytest.mark.parametrize("watch", ["hook", "retain_grad"])
@pytest.mark.parametrize("where", [1, 2])
def test_who_watches_a_gradient_in_between_sees_it(watch: str, where: int) -> None:
    seen: list[Tensor] = []
    gradients = []
    for model in (fast_block(block(3, 1, first=True)), block(3, 1, first=True)):
        norm, act, conv, norm2, act2 = model.train()
        y = act(norm(wide(torch.float32)))
        z = y if where == 1 else conv(y)
        if watch == "hook":
            z.register_hook(seen.append)
        else:
            z.retain_grad()
        act2(norm2(conv(y) if where == 1 else z)).square().sum().backward()
        gradients.append(seen.pop() if watch == "hook" else z.grad)
    assert gradients[0] is not None and relative_error(*gradients) < 1e-4


def test_the_input_of_the_convolution_is_freed_before_the_gradients() -> None:
    norm, act, conv, norm2, act2 = fast_block(block(3, 1, first=True)).train()
    y = act(norm(wide(torch.float32).requires_grad_()))
    kept, z = weakref.ref(y), conv(y)
    del y
    out = act2(norm2(z))
    del z
    assert kept() is None
    out.sum().backward()
