"""The fast depthwise gradients agree with plain autograd; nothing else about a model changes."""

from __future__ import annotations

import copy
import ctypes
import platform
import subprocess
import sys

import pytest
import timm
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from finetune101.fast import compiled, tune_allocator
from finetune101.fast.depthwise import Depthwise, fast_depthwise

CHANNELS = 8  # too narrow for the kernels; WIDE suits them
WIDE = 32
LAYERS = [
    pytest.param(kind, kernel, stride, size, id=f"{kind.__name__}-k{kernel}-s{stride}-{size[0]}x{size[1]}")
    for kind in (nn.Conv2d, Conv2dSame)
    for kernel in (3, 5)
    for stride in (1, 2)
    for size in ((14, 14), (13, 17), (7, 10))
]


def make(
    kind: type[nn.Conv2d], kernel: int, stride: int, bias: bool = False, channels: int = CHANNELS
) -> nn.Sequential:
    padding = 0 if kind is Conv2dSame else kernel // 2
    torch.manual_seed(0)
    return nn.Sequential(kind(channels, channels, kernel, stride=stride, padding=padding, groups=channels, bias=bias))


def images(size: tuple[int, int], channels: int = CHANNELS) -> Tensor:
    x = torch.randn(5, channels, *size, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def gradients(model: nn.Module, x: Tensor, bf16: bool) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of x and of the parameters, for a fixed random gradient of the output."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    return out.detach(), [p.grad for p in (x, *model.parameters()) if p.grad is not None]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("channels", [CHANNELS, WIDE])
@pytest.mark.parametrize(("kind", "kernel", "stride", "size"), LAYERS)
def test_bf16_gradients_agree_with_plain_autograd(
    kind: type[nn.Conv2d], kernel: int, stride: int, size: tuple[int, int], channels: int
) -> None:
    plain = make(kind, kernel, stride, bias=True, channels=channels)
    fast = copy.deepcopy(plain)
    assert fast_depthwise(fast) == 1
    exact = gradients(plain, images(size, channels), bf16=False)[1]
    plain.zero_grad()
    plain_out, expected = gradients(plain, images(size, channels), bf16=True)
    fast_out, got = gradients(fast, images(size, channels), bf16=True)
    assert torch.equal(fast_out, plain_out)
    assert len(got) == len(expected) == 3
    for a, b, c in zip(got, expected, exact, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert relative_error(a, b) < 0.01
        assert relative_error(a, c) < 0.01


@pytest.mark.skipif(compiled() is None, reason="needs Linux and gcc")
@pytest.mark.parametrize(("kind", "kernel", "stride", "size"), LAYERS)
def test_fp32_gradients_agree_with_plain_autograd(
    kind: type[nn.Conv2d], kernel: int, stride: int, size: tuple[int, int]
) -> None:
    plain = make(kind, kernel, stride, bias=True, channels=WIDE)
    fast = copy.deepcopy(plain)
    fast_depthwise(fast)
    plain_out, expected = gradients(plain, images(size, WIDE), bf16=False)
    fast_out, got = gradients(fast, images(size, WIDE), bf16=False)
    torch.testing.assert_close(fast_out, plain_out)
    assert len(got) == len(expected) == 3
    assert not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))  # the kernels were at work
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.skipif(compiled() is None, reason="needs Linux and gcc")
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.004), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("kind", "kernel", "stride", "size"), LAYERS)
def test_output_and_its_moments_agree_with_float64(
    kind: type[nn.Conv2d], kernel: int, stride: int, size: tuple[int, int], dtype: torch.dtype, error: float
) -> None:
    """A mean far from zero leaves the variance its digits."""
    exact = make(kind, kernel, stride, channels=WIDE).double()
    fast = copy.deepcopy(exact).float()
    fast_depthwise(fast)
    x = (images(size, WIDE) + 30).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = fast(x)
    assert relative_error(out.detach(), exact(x.double()).detach()) < error
    near, sums = out.depthwise.moments
    shift, square = (sums / (out.numel() // WIDE)).view(2, 1, -1)
    mean, values = near + shift[0], out.detach().double().permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(mean, values.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(square[0] - shift[0].square(), values.var(1, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(14, 14), (13, 17)])
@pytest.mark.parametrize("less", [0, 1])
def test_formulas_are_exact_in_float64(kernel: int, stride: int, size: tuple[int, int], less: int) -> None:
    """Uneven padding included: ``less`` rows and columns fewer before than after."""
    after = (kernel // 2, kernel // 2)
    before = (after[0] - less, after[1] - less)
    x = images(size).double().requires_grad_()
    weight = torch.randn(CHANNELS, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(CHANNELS, dtype=torch.float64, requires_grad=True)
    padded = nn.functional.pad(x, (before[1], after[1], before[0], after[0]))
    expected = nn.functional.conv2d(padded, weight, bias, stride, groups=CHANNELS)
    (out,) = Depthwise.apply(x, weight, bias, (stride, stride), before, after)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, (x, weight, bias), upstream),
        torch.autograd.grad(expected, (x, weight, bias), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
def test_narrow_fp32_layers_and_evaluation_are_untouched(kind: type[nn.Conv2d]) -> None:
    plain = make(kind, 5, 2)
    fast = copy.deepcopy(plain)
    fast_depthwise(fast)
    plain_out, expected = gradients(plain, images((13, 13)), bf16=False)
    fast_out, got = gradients(fast, images((13, 13)), bf16=False)
    assert torch.equal(fast_out, plain_out)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for bf16 in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            assert torch.equal(fast.eval()(images((13, 13))), plain.eval()(images((13, 13))))


def test_model_keeps_its_names_and_only_depthwise_layers_change() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),  # dense
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),  # grouped
        nn.Conv2d(8, 8, 3, padding=2, groups=8, dilation=2),
        nn.Conv2d(8, 8, 4, groups=8),  # even filter
        nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="circular"),
    )
    state = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    assert fast_depthwise(model) == 1
    assert fast_depthwise(model) == 0
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(isinstance(m, nn.Conv2d) for m in model)


def test_same_numbers_twice_and_frozen_filters() -> None:
    model = make(nn.Conv2d, 5, 2)
    fast_depthwise(model)
    first = gradients(model, images((14, 14)), bf16=True)[1]
    model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, images((14, 14)), bf16=True)[1], first, strict=True))
    model.zero_grad()
    model.requires_grad_(False)
    frozen = gradients(copy.deepcopy(model), images((14, 14)), bf16=True)[1]
    assert len(frozen) == 1
    assert torch.equal(frozen[0], first[0])


def test_whole_network_gradients_agree_with_plain_bf16() -> None:
    """timm's network, with padding of both kinds, in training mode: only rounding differs."""
    torch.manual_seed(0)
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=5, drop_rate=0.0)
    fast = copy.deepcopy(plain)
    assert fast_depthwise(fast) == 16
    x = torch.randn(8, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    plain_out, expected = gradients(plain, x, bf16=True)
    fast_out, got = gradients(fast, x, bf16=True)
    assert relative_error(fast_out, plain_out) < 0.05
    # As one vector: biases ahead of a batch normalisation have no gradient but rounding.
    assert relative_error(torch.cat([g.flatten() for g in got]), torch.cat([g.flatten() for g in expected])) < 0.05


def test_allocator_is_tuned_on_glibc_only() -> None:
    """In a process of its own, as the setting lasts; large tensors still come and go, in threads as well."""
    code = (
        "import torch, concurrent.futures as f\n"
        "from finetune101.fast import tune_allocator\n"
        "done = tune_allocator()\n"
        "pool = f.ThreadPoolExecutor(2)\n"
        "total = sum(pool.map(lambda n: torch.ones(n, 2**20).sum().item(), [1, 40, 2, 40]))\n"
        "assert total == 83 * 2**20, total\n"
        "print(done)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    glibc = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    assert result.stdout.strip() == str(glibc)


@pytest.mark.parametrize(("system", "library"), [("darwin", "glibc"), ("win32", ""), ("linux", "musl")])
def test_allocator_is_left_alone_elsewhere(monkeypatch: pytest.MonkeyPatch, system: str, library: str) -> None:
    """Another C library may have a ``mallopt`` that means something else: it is not even looked for."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, "1.2"))
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: pytest.fail("the C library was opened"))
    assert tune_allocator() is False
