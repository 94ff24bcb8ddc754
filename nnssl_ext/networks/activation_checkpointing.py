"""Recompute activations in the backward pass to save memory.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. Names of modules and tensors stay the
same, and so do loss and gradients: dropout and drop-path repeat their draws, and running
statistics see each batch once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(parts: Iterable[nn.Module]) -> None:
    """Checkpoint the given modules, each once."""
    for part in parts:
        # an attribute of the instance: a wrapper would change the names of all tensors
        part.__dict__["forward"] = partial(_computed_twice, part)


def _computed_twice(part: nn.Module, *inputs: Any, **options: Any) -> Any:
    forward = MethodType(type(part).forward, part)
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    if torch.compiler.is_compiling() or not any(isinstance(module, _BatchNorm) for module in part.modules()):
        return checkpoint(forward, *inputs, use_reentrant=False, **options)
    return checkpoint(
        forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _buffers_kept(part)), **options
    )


@contextmanager
def _buffers_kept(part: nn.Module) -> Iterator[None]:
    """Redirect buffer updates to copies. A batch norm has counted this batch already."""
    kept = [(module, name, buffer) for module in part.modules() for name, buffer in module._buffers.items()]
    for module, name, buffer in kept:
        module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in kept:
            module._buffers[name] = buffer
