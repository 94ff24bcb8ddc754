"""Build optimizers and compute learning rates per step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nnssl_ext.methods import OptimizerRecipe, ParameterGroup

#: Numbers that an optimizer keeps per parameter: a momentum, or two moments.
STATES = {"sgd": 1, "adam": 2, "adamw": 2}


def build_optimizer(
    recipe: OptimizerRecipe, groups: Iterable[ParameterGroup], learning_rate: float
) -> torch.optim.Optimizer:
    """Build a recipe's optimizer. Each group keeps its scales for ``set_rates``."""
    groups = list(groups)
    described: list[dict[str, Any]] = [
        {
            "params": group.parameters,
            "lr_scale": group.lr_scale,
            "weight_decay_scale": group.weight_decay_scale,
            "frozen": group.frozen,
            "weight_decay": 0.0,
        }
        for group in groups
    ]
    # one kernel for all parameters; on a GPU it can also skip a step without the host waiting (run/nonfinite.py)
    kinds = {p.device.type for group in groups for p in group.parameters}
    fused = True if kinds in ({"cuda"}, {"cpu"}) else None
    if recipe.name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            described, learning_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=fused
        )
        for group in groups:
            fill_momentum(optimizer, group.parameters)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.name]
        optimizer = kind(described, learning_rate, betas=recipe.betas, fused=fused)
    set_rates(optimizer, recipe, learning_rate, 0, 1)
    return optimizer


def fill_momentum(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Start the momentum of SGD at zero where there is none.

    A fused first step that an overflow skips would leave it uninitialized. From zero it is what it always is.
    """
    for parameter in parameters:
        state = optimizer.state[parameter]
        if parameter.requires_grad and state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state that another device may have written. Kernels stay those of this device."""
    # before loading, since torch moves the counted steps of Adam to where these kernels need them
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
    groups = [{**saved, "fused": own.get("fused")} for saved, own in pairs]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group in optimizer.param_groups:
        if group["fused"] and isinstance(optimizer, torch.optim.SGD):
            fill_momentum(optimizer, group["params"])


def set_rates(optimizer: torch.optim.Optimizer, recipe: OptimizerRecipe, peak: float, step: int, steps: int) -> None:
    """Set learning rate and weight decay for a step, counted from 0."""
    rate, decay = learning_rate_at(recipe, peak, step, steps), weight_decay_at(recipe, step, steps)
    for group in optimizer.param_groups:
        frozen = step < group.get("frozen", 0.0) * steps
        group["lr"] = 0.0 if frozen else rate * group.get("lr_scale", 1.0)
        group["weight_decay"] = decay * group.get("weight_decay_scale", 1.0)


def clip_gradients(modules: Iterable[Sequence[Tensor]], max_norm: float) -> Tensor:
    """Clip each module's gradient norm. Return the total norm, ()."""
    norms = [torch.nn.utils.clip_grad_norm_(parameters, max_norm) for parameters in modules]
    # the norm of no gradients is 0 on the CPU
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def weight_decay_at(recipe: OptimizerRecipe, step: int, steps: int) -> float:
    """Return the weight decay at a step. It follows half a cosine to its final value."""
    if recipe.final_weight_decay is None:
        return recipe.weight_decay
    share = (1 - math.cos(math.pi * step / max(1, steps))) / 2
    return recipe.weight_decay + (recipe.final_weight_decay - recipe.weight_decay) * share


def learning_rate_at(recipe: OptimizerRecipe, peak: float, step: int, steps: int) -> float:
    """Return the learning rate at a step. Linear warmup to ``peak``, then the schedule, which ends at zero."""
    warmup = round(recipe.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    left = 1 - (step - warmup) / max(1, steps - warmup)
    if recipe.schedule == "poly":
        return peak * left**0.9
    if recipe.schedule == "step":
        # 20,000 of VolumeFusion's 100,000 steps
        return peak * 0.5 ** (5 * step // max(1, steps))
    if recipe.schedule == "cosine":
        return peak * (1 - math.cos(math.pi * left)) / 2
    return peak
