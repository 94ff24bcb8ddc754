"""From a method's recipe to an optimiser and a learning rate; the rate is a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_ext.methods import OptimizerRecipe, ParameterGroup

#: Numbers that an optimiser keeps for each parameter: its momentum, or its two moments.
STATES = {"sgd": 1, "adam": 2, "adamw": 2}


def build_optimiser(
    recipe: OptimizerRecipe, groups: Iterable[ParameterGroup], learning_rate: float
) -> torch.optim.Optimizer:
    """The optimiser of a recipe over groups of parameters; each group remembers its multiples for ``set_rates``."""
    groups = list(groups)
    optimised: list[dict[str, Any]] = [
        {
            "params": group.parameters,
            "lr_scale": group.lr_scale,
            "weight_decay_scale": group.weight_decay_scale,
            "frozen": group.frozen,
            "weight_decay": 0.0,
        }
        for group in groups
    ]
    # one kernel for all parameters; on a GPU it can also skip a step without the host waiting (training/guards.py)
    kinds = {p.device.type for group in groups for p in group.parameters}
    fused = True if kinds in ({"cuda"}, {"cpu"}) else None
    if recipe.name == "sgd":
        optimiser: torch.optim.Optimizer = torch.optim.SGD(
            optimised, learning_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=fused
        )
        # a fused first step that an overflow skips would leave it uninitialised; from zero it is what it always is
        for group in groups:
            for parameter in group.parameters:
                optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.name]
        optimiser = kind(optimised, learning_rate, fused=fused)
    set_rates(optimiser, recipe, learning_rate, 0, 1)
    return optimiser


def set_rates(optimiser: torch.optim.Optimizer, recipe: OptimizerRecipe, peak: float, step: int, steps: int) -> None:
    """Learning rate and weight decay of every group for one step."""
    rate, decay = learning_rate_at(recipe, peak, step, steps), weight_decay_at(recipe, step, steps)
    for group in optimiser.param_groups:
        frozen = step < group.get("frozen", 0.0) * steps
        group["lr"] = 0.0 if frozen else rate * group.get("lr_scale", 1.0)
        group["weight_decay"] = decay * group.get("weight_decay_scale", 1.0)


def clip_gradients(parts: Iterable[nn.Module], largest: float) -> Tensor:
    """Shorten each part's gradient to the norm ``largest``; the norm of all of them before, ()."""
    norms = [torch.nn.utils.clip_grad_norm_(part.parameters(), largest) for part in parts]
    # a part without gradients says 0 on the CPU
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def weight_decay_at(recipe: OptimizerRecipe, step: int, steps: int) -> float:
    """From the recipe's weight decay along half a cosine to its final one."""
    if recipe.final_weight_decay is None:
        return recipe.weight_decay
    share = (1 - math.cos(math.pi * step / max(1, steps))) / 2
    return recipe.weight_decay + (recipe.final_weight_decay - recipe.weight_decay) * share


def learning_rate_at(recipe: OptimizerRecipe, peak: float, step: int, steps: int) -> float:
    """Linear warm-up to ``peak``, then constant, poly or cosine decay that would reach zero at ``steps``."""
    warm_up = round(recipe.warmup * steps)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    left = 1 - (step - warm_up) / max(1, steps - warm_up)
    if recipe.schedule == "poly":
        return peak * left**0.9
    if recipe.schedule == "cosine":
        return peak * (1 - math.cos(math.pi * left)) / 2
    return peak
