"""Skip non-finite batches, and end a run with too many.

The verdict is a tensor on the device. On the CPU the host reads it at every step, which costs nothing there. On a GPU
the fused optimizers skip the step themselves (``found_inf``), and the host reads the verdicts once in a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnssl_ext.data.cases import shorten
from nnssl_ext.training.distributed.ranks import world

#: Steps between two readings of the verdicts on a GPU.
READ_EVERY = 16


class FiniteGuard:
    """Protects a training from batches that are not finite.

    The module's buffers must change in place: the guard collects them once. Counters among them, which are integers,
    are not restored.

    Args:
        module: The trained module. The effect of a bad batch on its buffers (running statistics, centers) is undone.
        optimizer: Optimizer of the module.
        limit: Batches that a run may skip.
        log: Called with a line for each of them.

    Attributes:
        skipped: Batches of this run that changed nothing.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, limit: int, log: Callable[[str], None]
    ) -> None:
        self.optimizer, self.limit, self.log = optimizer, limit, log
        self.skipped = 0
        self._state = [*module.parameters(), *module.buffers()]
        self._buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self._copies = [torch.empty_like(buffer) for buffer in self._buffers]
        self._verdict = torch.zeros((), dtype=torch.bool)
        self._at_fault = self._verdict
        self._pending: list[tuple[int, Sequence[str], Tensor, Tensor]] = []

    @contextmanager
    def step(self, number: int, cases: Sequence[str]) -> Iterator[Callable[[Tensor, Tensor | None], bool]]:
        """Guard one step, from before the forward pass to the end.

        Yields:
            ``allows(loss, norm)``, to call after the backward pass: whether to call the optimizer. ``loss`` is this
            process's scalar. ``norm`` is the norm of the gradients, or None where a gradient scaler skips steps
            itself, whose overflows do not count.
        """
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)
        yield self._allows
        self._undo()
        self._pending.append((number, cases, self._verdict, self._at_fault))
        if not self.defers(self._verdict) or len(self._pending) >= READ_EVERY:
            self.read()

    def _allows(self, loss: Tensor, norm: Tensor | None) -> bool:
        bad = ~torch.isfinite(loss.detach())
        self._at_fault = bad
        if norm is not None:
            bad = bad | ~torch.isfinite(norm)
        if world() > 1:
            shared = bad.float()
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            bad = shared > 0
        self._verdict = bad
        if norm is None:
            return True
        if self.defers(bad):
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            return True
        return not bool(bad)

    def defers(self, verdict: Tensor) -> bool:
        """Return whether the optimizer skips bad steps itself, and the host reads verdicts once in a while."""
        return verdict.is_cuda and bool(self.optimizer.param_groups[0].get("fused"))

    def _undo(self) -> None:
        if not self.defers(self._verdict):
            if self._buffers and bool(self._verdict):
                torch._foreach_copy_(self._buffers, self._copies)
            return
        for buffer, before in zip(self._buffers, self._copies, strict=True):
            torch.where(self._verdict, before, buffer, out=buffer)

    def read(self) -> None:
        """Name and count bad batches since the last reading."""
        if not self._pending:
            return
        verdicts = torch.stack([torch.stack([bad, fault]) for _, _, bad, fault in self._pending]).tolist()
        own = [(step, fault, cases) for (step, cases, _, _), (_, fault) in zip(self._pending, verdicts, strict=True)]
        everyone = [own]
        if world() > 1 and any(bad for bad, _ in verdicts):  # all agree on the verdicts, and the first writes the log
            everyone = [own] * world()
            dist.all_gather_object(everyone, own)
        for place, (bad, _) in enumerate(verdicts):
            if bad:
                self.skipped += 1
                self.log(self._line([steps[place] for steps in everyone]))
        self._pending.clear()

    def _line(self, steps: Sequence[tuple[int, bool, Sequence[str]]]) -> str:
        """Describe a skipped step. Each process gives (number, whether the loss was at fault, cases)."""
        at_fault = [rank for rank, (_, fault, _) in enumerate(steps) if fault]
        named = [(rank, shorten(steps[rank][2], 20)) for rank in at_fault or range(len(steps))]
        cases = [text if world() == 1 else f"{text} (process {rank})" for rank, text in named]
        return (
            f"{'the objective' if at_fault else 'a gradient'} was not finite at step {steps[0][0]}: the batch changed "
            f"nothing ({self.skipped} of at most {self.limit} skipped); cases: {', '.join(cases)}"
        )

    @property
    def problem(self) -> str:
        """Return why the run must end, '' otherwise. It is equal in every process."""
        if self.skipped <= self.limit:
            return ""
        return (
            f"the objective or its gradients were not finite in {self.skipped} batches, more than "
            f"nnssl_ext.max_nonfinite_batches={self.limit} allows; the log names their cases. Look at these, and start "
            f"anew with a lower nnssl_ext.learning_rate, or raise max_nonfinite_batches and go on with --c"
        )

    @torch.no_grad()
    def is_sound(self) -> bool:
        """Check that every weight and buffer is finite."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self._state)
