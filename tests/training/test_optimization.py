import itertools
from dataclasses import replace

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn

from nnssl_ext.methods import OptimizerRecipe, ParameterGroup
from nnssl_ext.training.optimization import (
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    restore_optimizer,
    set_rates,
    weight_decay_at,
)


def recipe(schedule: str, warm_up: float = 0.0, name: str = "adamw") -> OptimizerRecipe:
    return OptimizerRecipe(name, 1e-3, 0.01, schedule, warm_up)


def test_warm_up_rises_to_the_peak_and_cosine_falls_to_zero() -> None:
    rates = [learning_rate_at(recipe("cosine", 0.1), 2.0, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.01


def test_step_halves_the_rate_after_each_fifth_of_the_steps() -> None:
    found = [learning_rate_at(recipe("step"), 0.5, step, 100_000) for step in (0, 19_999, 20_000, 40_000, 99_999)]
    assert found == [0.5, 0.5, 0.25, 0.125, 0.5**5]


def test_poly_is_nnunets() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    scheduler = PolyLRScheduler(torch.optim.SGD([parameter], 0.5), 0.5, 40)
    for step in (0, 7, 39):
        scheduler.step(step)
        assert learning_rate_at(recipe("poly"), 0.5, step, 40) == pytest.approx(scheduler.get_last_lr()[0])


def test_constant_and_zero() -> None:
    assert {learning_rate_at(recipe("constant"), 0.3, step, 10) for step in range(10)} == {0.3}
    assert {learning_rate_at(recipe("cosine", 0.5), 0.0, step, 10) for step in range(10)} == {0.0}


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_each_kind_of_optimizer(name: str, kind: type) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = build_optimizer(recipe("constant", name=name), [ParameterGroup(list(module[1].parameters()))], 0.1)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in module[1].parameters()]
    assert group["weight_decay"] == 0.01
    assert group["lr"] == 0.1


def test_groups_keep_their_multiples_of_rate_and_decay() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [ParameterGroup([parameters[0]]), ParameterGroup([parameters[1]], lr_scale=0.5, weight_decay_scale=0.0)]
    rising = replace(recipe("constant"), final_weight_decay=0.11)
    optimizer = build_optimizer(rising, groups, 0.2)
    for step, decay in ((0, 0.01), (50, 0.06), (100, 0.11)):
        assert weight_decay_at(rising, step, 100) == pytest.approx(decay)
        set_rates(optimizer, rising, 0.2, step, 100)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.2, 0.1])
        assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([decay, 0.0])


def test_a_first_step_that_is_skipped_leaves_no_momentum() -> None:
    """As an overflow does at the first step in float16: torch's fused SGD would keep memory that it never wrote."""
    weight = nn.Parameter(torch.zeros(4))
    optimizer = build_optimizer(recipe("constant", name="sgd"), [ParameterGroup([weight], 1.0, 0.0)], 0.1)
    assert not optimizer.state[weight]["momentum_buffer"].any()
    plain = nn.Parameter(torch.zeros(4))
    stock = torch.optim.SGD([plain], 0.1, momentum=0.99, nesterov=True)
    for step in range(3):
        weight.grad = plain.grad = torch.arange(4.0) - step
        set_rates(optimizer, recipe("constant", name="sgd"), 0.1, step, 3)
        optimizer.step()
        stock.step()
    torch.testing.assert_close(weight, plain)


def test_each_part_is_shortened_for_itself() -> None:
    long, short, untouched = (nn.Linear(3, 1, bias=False) for _ in range(3))
    long.weight.grad, short.weight.grad = torch.full((1, 3), 1e3), torch.tensor([[0.6, 0.0, 0.8]])
    norm = clip_gradients([[module.weight] for module in (long, short, untouched)], 2.0)
    assert norm.item() == pytest.approx((3e6 + 1) ** 0.5)
    assert long.weight.grad.norm().item() == pytest.approx(2.0)
    assert short.weight.grad.norm().item() == pytest.approx(1.0)
    long.weight.grad.fill_(torch.nan)
    assert clip_gradients([[short.weight], [long.weight]], 2.0).isnan()  # one bad part is a bad batch
    long.weight.grad.fill_(1e3)
    clip_gradients([[long.weight, short.weight]], 2.0)  # together, the long one takes nearly all
    assert short.weight.grad.norm().item() < 0.01


def test_a_state_of_another_device_keeps_this_ones_kernels() -> None:
    """A state without momentum of frozen weights, from a run without fused kernels."""
    trained, frozen = (nn.Parameter(torch.ones(3)) for _ in range(2))
    before = torch.optim.SGD([trained, frozen], 0.1, momentum=0.9)
    trained.grad = torch.ones(3)
    before.step()
    after = torch.optim.SGD([trained, frozen], 0.1, momentum=0.9, fused=True)
    restore_optimizer(after, before.state_dict())
    assert after.param_groups[0]["fused"]
    assert torch.equal(after.state[trained]["momentum_buffer"], torch.ones(3))
    assert torch.equal(after.state[frozen]["momentum_buffer"], torch.zeros(3))
    adam = torch.optim.AdamW([trained], 0.1)
    adam.step()
    fused = torch.optim.AdamW([trained], 0.1, fused=True)
    restore_optimizer(fused, adam.state_dict())
    assert fused.param_groups[0]["fused"]
    assert not adam.param_groups[0]["fused"]
    frozen.grad = torch.ones(3)
    after.found_inf = torch.zeros(1)  # type: ignore[attr-defined] # as the gradient scaler sets it
    after.step()
