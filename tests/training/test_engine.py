from typing import Any

import pytest
import torch
from torch import nn

from nnssl_ext.methods.volume_fusion import VolumeFusion, VolumeFusionSettings
from nnssl_ext.training.engine import arrange, lay_out_as_weights
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
    arrange(method, wish, CPU, precision)
    assert {weight.is_contiguous(memory_format=LAST) for weight in kernels(method)} == {last}


def test_both_formats_compute_the_same() -> None:
    image = torch.rand(2, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    outputs, gradients, formats = [], [], list[bool]()
    for wish in ("contiguous", "channels_last"):
        torch.manual_seed(0)
        method = build(VolumeFusion, VolumeFusionSettings())
        arrange(method, wish, CPU, None)
        first = next(m for m in method.modules() if isinstance(m, nn.Conv3d))
        first.register_forward_hook(lambda *a: formats.append(a[-1].is_contiguous(memory_format=LAST)))
        output = method.network(image)[0]
        output.square().mean().backward()
        outputs.append(output)
        gradients.append(torch.cat([p.grad.flatten() for p in method.network.parameters() if p.grad is not None]))
    assert formats == [False, True]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-5)


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
    lay_out_as_weights(other)
    go_on(weight, other, range(3, 6))
    assert torch.equal(weight, expected)
