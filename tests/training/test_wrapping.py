from typing import Any

import pytest
import torch
from torch import nn

from nnssl_ext.methods.volume_fusion import VolumeFusion, VolumeFusionSettings
from nnssl_ext.training.onednn import TwoSliceConv3d, avoid_two_slice_bug
from nnssl_ext.training.wrapping import match_memory_format, mixed_precision, note_other_arithmetic, set_memory_format
from tests.methods.helpers import build

CPU, LAST = torch.device("cpu"), torch.channels_last_3d


def kernels(module: nn.Module) -> list[Any]:
    weights: list[Any] = [m.weight for m in module.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))]
    return [w for w in weights if w[0, 0].numel() > 1]  # single weights lie in both formats


@pytest.mark.parametrize(
    ("wish", "precision", "last"),
    [
        ("auto", torch.bfloat16, True),
        ("auto", None, False),
        ("contiguous", torch.bfloat16, False),
        ("channels_last", None, True),
    ],
)
def test_channels_are_last_where_that_is_faster(wish: str, precision: torch.dtype | None, last: bool) -> None:
    method = build(VolumeFusion, VolumeFusionSettings())
    set_memory_format(method, wish, CPU, precision)
    assert {weight.is_contiguous(memory_format=LAST) for weight in kernels(method)} == {last}


def test_both_formats_compute_the_same() -> None:
    image = torch.rand(2, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    outputs, gradients, formats = [], [], list[bool]()
    for wish in ("contiguous", "channels_last"):
        torch.manual_seed(0)
        method = build(VolumeFusion, VolumeFusionSettings())
        set_memory_format(method, wish, CPU, None)
        first = next(m for m in method.modules() if isinstance(m, nn.Conv3d))
        first.register_forward_hook(lambda *a: formats.append(a[-1].is_contiguous(memory_format=LAST)))
        output = method.network(image)[0]
        output.square().mean().backward()
        outputs.append(output)
        gradients.append(torch.cat([p.grad.flatten() for p in method.network.parameters() if p.grad is not None]))
    assert formats == [False, True]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-5)


def worst_gradient(convolution: nn.Conv3d, slices: int) -> float:
    """How far the weights' gradient in bfloat16 is from that in float64, as a share of its largest value."""
    worst = 0.0
    for _ in range(4):
        image, sent = torch.randn(2, 16, slices, 6, 5), torch.randn(2, 16, slices, 6, 5)
        unwritten = [torch.full((1 << power,), 1e3) for power in range(4, 20) for _ in range(2)]
        del unwritten  # what was in freed memory must not matter
        with torch.autocast("cpu", torch.bfloat16):
            output = convolution(image)
        assert output.dtype is torch.bfloat16
        (found,) = torch.autograd.grad(output, convolution.weight, sent.bfloat16())
        exact = nn.functional.conv3d(
            image.double(), (wanted := convolution.weight.detach().double().requires_grad_()), padding=1
        )
        (right,) = torch.autograd.grad(exact, wanted, sent.double())
        worst = max(worst, ((found.double() - right).abs().max() / right.abs().max()).nan_to_num(torch.inf).item())
    return worst


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_gradients_of_flat_maps_are_avoid_two_slice_bug(slices: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(16, 16, 3, padding=1))
    names = list(network.state_dict())
    avoid_two_slice_bug(network, CPU, torch.bfloat16)
    assert list(network.state_dict()) == names
    assert isinstance(network[0], TwoSliceConv3d)
    assert worst_gradient(network[0], slices) < 0.03


def test_what_torch_itself_does() -> None:
    torch.manual_seed(0)
    if worst_gradient(nn.Conv3d(16, 16, 3, padding=1), 2) < 0.03:
        pytest.skip("this torch computes it right on this CPU")
    assert worst_gradient(nn.Conv3d(16, 16, 3, padding=1), 2) > 0.5


@pytest.mark.parametrize("stored", [torch.contiguous_format, LAST])
def test_a_fused_optimiser_goes_on_whatever_the_format_of_its_averages(stored: torch.memory_format) -> None:
    def trained(steps: int) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 3, 2, 2, 2, generator=generator).contiguous(memory_format=LAST))
        optimiser = torch.optim.AdamW([weight], lr=0.1, fused=True)
        return weight, go_on(weight, optimiser, range(steps))

    def go_on(weight: nn.Parameter, optimiser: torch.optim.Optimizer, steps: range) -> torch.optim.Optimizer:
        for step in steps:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).to(
                memory_format=LAST
            )
            optimiser.step()
        return optimiser

    expected, _ = trained(6)
    weight, optimiser = trained(3)
    content = optimiser.state_dict()
    for values in content["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            values[name] = values[name].contiguous(memory_format=stored)
    other = torch.optim.AdamW([weight], lr=0.1, fused=True)
    other.load_state_dict(content)
    match_memory_format(other)
    go_on(weight, other, range(3, 6))
    assert torch.equal(weight, expected)


@pytest.mark.parametrize(("capability", "wanted"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_gpus_that_only_emulate_bfloat16_take_float16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], wanted: torch.dtype
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _=None: capability)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)  # as torch says of both
    assert mixed_precision(torch.device("cuda")) is wanted


@pytest.mark.parametrize("units", ["_is_amx_tile_supported", "_is_avx512_bf16_supported"])
def test_a_cpu_that_computes_in_bfloat16_does_so(units: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert mixed_precision(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cpu, units, lambda: True)
    assert mixed_precision(torch.device("cpu")) is torch.bfloat16


def test_a_run_that_continues_in_another_arithmetic_says_so() -> None:
    lines: list[str] = []
    note_other_arithmetic(None, torch.bfloat16, lines.append)
    note_other_arithmetic("float32", None, lines.append)
    note_other_arithmetic("float32", torch.bfloat16, lines.append)
    assert lines == ["note: the steps so far were computed in float32, the next ones are in bfloat16"]
