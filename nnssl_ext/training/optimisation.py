"""From a method's recipe to an optimiser and a learning rate; the rate is a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nnssl_ext.methods import OptimiserRecipe


def build_optimiser(
    recipe: OptimiserRecipe, parameters: Iterable[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """The optimiser of a recipe over the parameters that take a gradient."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    # fused optimisers can skip a step on the device, without the host waiting for the verdict (training/guards.py)
    options: dict[str, Any] = {
        "weight_decay": recipe.weight_decay,
        "fused": True if all(p.is_cuda for p in trainable) else None,
    }
    if recipe.name == "sgd":
        return torch.optim.SGD(trainable, learning_rate, momentum=0.99, nesterov=True, **options)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.name]
    return kind(trainable, learning_rate, **options)


def learning_rate_at(recipe: OptimiserRecipe, peak: float, step: int, steps: int) -> float:
    """Linear warm-up to ``peak``, then constant, poly or cosine decay that would reach zero at ``steps``."""
    warm_up = round(recipe.warm_up * steps)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    left = 1 - (step - warm_up) / max(1, steps - warm_up)
    if recipe.schedule == "poly":
        return peak * left**0.9
    if recipe.schedule == "cosine":
        return peak * (1 - math.cos(math.pi * left)) / 2
    return peak
