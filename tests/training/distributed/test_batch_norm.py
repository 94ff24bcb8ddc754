"""Batch norm over two processes is torch's over one, in value, gradient and memory."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnssl_ext.networks.architectures.pct_net import PCTNet
from nnssl_ext.training.distributed.batch_norm import GlobalBatchNorm, synchronize
from tests.datasets import architecture
from tests.support.processes import ranks


def network(momentum: float | None) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm3d(4, momentum=momentum)
    return nn.Sequential(norm, nn.Conv3d(4, 3, 1), nn.PReLU(), nn.Sequential(nn.BatchNorm3d(3, affine=False))).double()


def images() -> Tensor:
    return 3 * torch.randn(3, 4, 5, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 10


def passed(module: nn.Module, image: Tensor) -> list[Tensor]:
    """Output and gradients of a training pass, and the output of an evaluation after it."""
    image = image.requires_grad_()
    output = module(image)
    (output**3).sum().backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert image.grad is not None
    return [output.detach(), image.grad, module.eval()(image).detach(), *gradients]


def process(rank: int, world: int, port: int, folder: Path, momentum: float | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    module = synchronize(network(momentum))
    result = passed(module, images()[rank::world])
    torch.save((result, dict(module.state_dict())), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_two_processes_with_uneven_batches(tmp_path: Path, momentum: float | None) -> None:
    assert ranks(2, process, tmp_path, momentum) == [0, 0]
    one = network(momentum)
    expected, memory = passed(one, images()), one.state_dict()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank, (result, _) in enumerate(parts):
        for mine, whole in zip(result[:3], expected[:3], strict=True):
            torch.testing.assert_close(mine, whole[rank::2], rtol=1e-9, atol=1e-9)
    for *gradients, whole in zip(*(result[3:] for result, _ in parts), expected[3:], strict=True):
        torch.testing.assert_close(sum(gradients), whole, rtol=1e-9, atol=1e-9)
    for _, state in parts:
        assert state.keys() == memory.keys()
        for name, value in memory.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-9)


def pct_net() -> nn.Module:
    torch.manual_seed(0)
    arguments = {**architecture("pct_net")["arch_kwargs"], "dropout": [0.0] * 5, "drop_path": 0.0}
    return PCTNet(input_channels=1, num_classes=3, deep_supervision=False, **arguments).double()


def gradient(module: nn.Module, image: Tensor) -> Tensor:
    (module(image) ** 2).mean((1, 2, 3, 4)).sum().backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def pct_net_process(rank: int, world: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    total = gradient(synchronize(pct_net()), volumes()[rank::world])
    dist.all_reduce(total)
    torch.save(total, folder / f"{rank}.pt")
    dist.destroy_process_group()


def volumes() -> Tensor:
    return torch.randn(3, 1, 8, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_gradients_of_a_network_with_many(tmp_path: Path) -> None:
    assert ranks(2, pct_net_process, tmp_path) == [0, 0]
    expected = gradient(pct_net(), volumes())
    assert (torch.load(tmp_path / "0.pt") - expected).norm() < 1e-9 * expected.norm()


def test_every_batch_norm_keeps_its_parameters() -> None:
    module = network(0.1)
    before = dict(module.named_parameters())
    synchronize(module)
    assert sum(isinstance(part, GlobalBatchNorm) for part in module.modules()) == 2
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
