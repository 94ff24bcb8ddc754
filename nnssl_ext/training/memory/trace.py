"""Trace the memory of a training step on tensors without storage.

Every operation of the forward and the backward pass is dispatched as it would be on a GPU, under autocast where the run
has it, and computes nothing. What an operation needs within itself (the workspaces of cuDNN) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnssl_ext.methods import Method

#: Shapes and types of the views of a batch.
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
#: CUDA's allocator hands out blocks in multiples of this.
BLOCK = 512


class LiveBytes(TorchDispatchMode):
    """Count storages while they are alive.

    Attributes:
        now: Bytes alive.
        peak: The most that were alive since ``mark``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    def mark(self) -> int:
        """Begin a new peak and return the live bytes."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor):
                self._add(part.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK

        def gone(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class _FusedAttention(torch.autograd.Function):
    """Keep the tensors that a fused attention kernel keeps.

    These are the arguments, the result and one number per query.
    """

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        result = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        context.save_for_backward(query, key, value, mask, result, sums)
        return result

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(context.saved_tensors[:4], context.needs_input_grad, strict=True)
        return tuple(torch.empty_like(tensor) if needed else None for tensor, needed in wanted)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Replace ``scaled_dot_product_attention``. On CPUs it has no fused kernel for a learned mask."""
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    mask = None if attn_mask is None else attn_mask.to(low)
    return _FusedAttention.apply(query.to(low), key.to(low), value.to(low), mask)


def _average(image: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Replace ``avg_pool3d``, which autocast computes in float32 on CPUs."""
    with torch.autocast("cpu", enabled=False):
        return torch._C._nn.avg_pool3d(image, *arguments, **options)


def _layer_norm(features: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Replace ``layer_norm``, which autocast computes in float32 on GPUs."""
    wider = features.float() if torch.is_autocast_enabled("cpu") else features
    return torch.layer_norm(wider, *arguments, **options)


@contextmanager
def _as_on_gpu() -> Iterator[None]:
    """Replace functions whose saved tensors differ between CPU and GPU."""
    instead = {
        "scaled_dot_product_attention": _fused_attention,
        "avg_pool3d": _average,
        "layer_norm": _layer_norm,
    }
    own = {name: getattr(nn.functional, name) for name in instead}
    try:
        for name, function in instead.items():
            setattr(nn.functional, name, function)
        yield
    finally:
        for name, function in own.items():
            setattr(nn.functional, name, function)


@contextmanager
def without_memory() -> Iterator[LiveBytes]:
    """Make new tensors without memory and count them."""
    # autograd counts the devices at its first backward pass. FakeTensorMode stands in for a GPU where there is none,
    # and the thread that autograd would start for that one forbids every later fork
    torch.zeros((), requires_grad=True).backward()
    with FakeTensorMode(), LiveBytes() as live, _as_on_gpu():
        yield live


def autocast(dtype: torch.dtype | None) -> AbstractContextManager:
    """Return the autocast context within ``without_memory``. None is float32."""
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def empty(module: nn.Module) -> None:
    """Replace parameters and buffers by tensors without storage."""
    parameters: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                without = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
                part._parameters[name] = parameters.setdefault(id(parameter), without)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@dataclass(frozen=True)
class Trace:
    """Hold the bytes of one step.

    Parameters, buffers and the optimizer's state come on top.

    Attributes:
        kept: What the forward pass leaves for the backward pass, and the loss.
        forward, backward: The most that is alive in each pass, gradients and views included.
        end: What is alive after the backward pass: gradients, views and the loss.
    """

    kept: int
    forward: int
    backward: int
    end: int


def trace_step(method: Method, views: Shapes, live: LiveBytes, dtype: torch.dtype | None) -> Trace:
    """Trace one step, as ``PretrainingTrainer.train_step`` does it.

    Args:
        method: In training mode, emptied.
        views: Of one batch.
        live: Of the surrounding ``without_memory``.
        dtype: Of mixed precision, None is float32.
    """
    method.zero_grad(set_to_none=True)
    start = live.mark()
    # what a bad batch did to buffers is undone (training/run/nonfinite.py)
    remembered = [buffer.clone() for buffer in method.buffers()]
    tensors = {name: torch.empty(shape, dtype=kind) for name, (shape, kind) in views.items()}
    before = live.now
    with autocast(dtype):
        terms = method(tensors)
    kept, forward = live.now - before, live.peak - start
    live.mark()
    terms["loss"].sum().backward()
    backward, end = live.peak - start, live.now - start
    del remembered
    return Trace(kept, forward, backward, end)
