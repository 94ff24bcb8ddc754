"""What is computed twice changes no number and no name; it keeps less."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from dynamic_network_architectures.architectures.primus import Primus
from torch import Tensor, nn

from nnssl_ext import checkpoint
from nnssl_ext.networks.backbone import backbone_of
from tests.conftest import Environment
from tests.support.networks import KINDS, network
from tests.support.processes import free_port, one_rank
from tests.support.runs import pretrain, trainer_for

Data = Callable[[str], Environment]
TRAINER = "nnsslTrainer_VolumeFusion"


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "primus":
        return Primus(1, 24, (8, 8, 8), 3, 2, 2, (16, 32, 32), drop_path_rate=0.5, init_values=0.1)
    return network(kind)


def first(outputs: Any) -> Tensor:
    return outputs[0] if isinstance(outputs, (list, tuple)) else outputs


def step(net: nn.Module, image: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and bytes that autograd keeps of one step."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = net(image)
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    loss = sum((output.square().mean() for output in outputs), torch.zeros(()))
    loss.backward()
    after = torch.rand(3)
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return torch.stack([loss.detach(), *after]), gradients, sum(kept.values())


@pytest.mark.parametrize("kind", [*KINDS, "primus"])
def test_a_step_is_the_same_and_keeps_less(kind: str) -> None:
    image = torch.randn(2, 1, 16, 32, 32)
    plain, twice = built(kind).train(), built(kind).train()
    names = list(twice.state_dict())
    backbone_of(twice).checkpoint_activations()
    assert list(twice.state_dict()) == names

    loss, gradients, kept = step(plain, image)
    loss2, gradients2, kept2 = step(twice, image)
    assert torch.equal(loss, loss2)  # and the generator is where it was
    assert set(gradients) == set(gradients2)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients2[name]), name
    for name, value in plain.state_dict().items():  # running statistics too
        assert torch.equal(value, twice.state_dict()[name]), name
    assert kept2 < 0.75 * kept


def test_a_copy_computes_with_its_own_weights() -> None:
    # the teacher of a self-distillation is a copy
    net = built("plain").train()
    backbone_of(net).checkpoint_activations()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    image = torch.randn(1, 1, 16, 16, 16)
    assert first(net(image)).abs().sum() > 0
    assert first(other(image)).abs().sum() == 0


def test_it_can_be_compiled() -> None:
    image = torch.randn(1, 1, 16, 16, 16)
    plain, twice = built("plain").train(), built("plain").train()
    backbone_of(twice).checkpoint_activations()
    compiled: Any = torch.compile(twice, backend="aot_eager")
    expected, found = first(plain(image)), first(compiled(image))
    torch.testing.assert_close(found, expected)
    for output in (expected, found):
        output.square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), twice.parameters(), strict=True):
        if a.grad is not None:
            assert b.grad is not None, name
            torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.parametrize("kind", ["residual", "pct_net"])
def test_a_run_writes_the_same_checkpoint(with_data: Data, kind: str) -> None:
    environment, digests = with_data(kind), []
    for name, twice in (("one", False), ("two", True)):
        environment.write_plans(kind, name, {"epochs": 1, "activation_checkpointing": twice})
        weights = checkpoint.load(pretrain(environment, kind, name) / "checkpoint_final.pth")["network_weights"]
        digests.append(checkpoint.digest(weights))
    assert digests[0] == digests[1]
    trainer = trainer_for(kind, "two")
    trainer.initialize()
    assert all("forward" in block.__dict__ for block in trainer.method.backbone.blocks())


def test_two_processes_equal_one_without(with_data: Data) -> None:
    environment = with_data("plain")
    settings = {"precision": "float32", "iterations_per_epoch": 2, "epochs": 1, "volume_fusion": {"optimizer": "sgd"}}
    environment.write_plans("plain", "one", settings)
    environment.write_plans("plain", "two", {**settings, "activation_checkpointing": True})
    one = checkpoint.load(pretrain(environment, "plain", "one") / "checkpoint_final.pth")
    mp.spawn(one_rank, args=(2, free_port(), "two", TRAINER), nprocs=2)
    two = checkpoint.load(environment.fold("plain", "two", TRAINER) / "checkpoint_final.pth")
    for a, b in zip(one["optimizer_state"]["state"].values(), two["optimizer_state"]["state"].values(), strict=True):
        torch.testing.assert_close(a["momentum_buffer"], b["momentum_buffer"], rtol=1e-3, atol=1e-5)
