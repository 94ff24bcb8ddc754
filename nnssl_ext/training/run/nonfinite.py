"""Batches whose objective or gradients are not finite: they change nothing, are named, and end a run when too many.

The verdict is a tensor on the device. Where reading it costs nothing (on the CPU) the host reads it at every step; on a
GPU the fused optimisers skip the step by themselves (``found_inf``) and the host reads what happened once in a while.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnssl_ext.data.cases import shorten
from nnssl_ext.training.distributed.ranks import world

#: On a GPU the host looks at the verdicts once in so many steps.
READ_EVERY = 16


class FiniteGuard:
    """See the module's docstring.

    Args:
        method: What is trained; what a bad batch did to its buffers (running statistics, centres) is undone.
        optimiser: Of the method.
        limit: So many batches may be skipped in a run.
        tell: Called with a line for each of them.

    Attributes:
        skipped: Batches of this run that changed nothing.
    """

    def __init__(
        self, method: nn.Module, optimiser: torch.optim.Optimizer, limit: int, tell: Callable[[str], None]
    ) -> None:
        self.method, self.optimiser, self.limit, self.tell = method, optimiser, limit, tell
        self.skipped = 0
        self._buffers: list[Tensor] = []
        self._bad = torch.zeros(())
        self._blame = torch.zeros(())
        self._pending: list[tuple[int, Sequence[str], Tensor, Tensor]] = []

    def __repr__(self) -> str:
        return f"FiniteGuard({self.skipped} of at most {self.limit} batches skipped)"

    def remember(self) -> None:
        """Before the forward pass: what its buffers are."""
        self._buffers = [buffer.clone() for buffer in self.method.buffers()]

    def judge(self, loss: Tensor, norm: Tensor | None) -> bool:
        """After the backward pass: whether the optimiser is to be called.

        Args:
            loss: Scalar, of this process.
            norm: Of the gradients; None where a gradient scaler skips steps by itself, whose overflows do not count.
        """
        bad = ~torch.isfinite(loss.detach())
        self._blame = bad
        if norm is not None:
            bad = bad | ~torch.isfinite(norm)
        if world() > 1:
            shared = bad.float()
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            bad = shared > 0
        self._bad = bad
        if norm is None:
            return True
        if bad.is_cuda and self.optimiser.param_groups[0].get("fused"):
            self.optimiser.found_inf = bad.float()  # type: ignore[attr-defined]
            return True
        return not bool(bad)

    def settle(self, step: int, cases: Sequence[str]) -> None:
        """After the step: buffers as they were if the batch was bad, and a note for ``read``."""
        for buffer, before in zip(self.method.buffers(), self._buffers, strict=True):
            buffer.copy_(torch.where(self._bad, before, buffer))
        self._buffers = []
        self._pending.append((step, cases, self._bad, self._blame))
        if self._bad.device.type == "cpu" or len(self._pending) >= READ_EVERY:
            self.read()

    def read(self) -> None:
        """Name and count the bad batches among the steps since the last reading."""
        if not self._pending:
            return
        verdicts = torch.stack([torch.stack([bad, blame]) for _, _, bad, blame in self._pending]).tolist()
        steps = [(step, blame, cases) for (step, cases, _, _), (_, blame) in zip(self._pending, verdicts, strict=True)]
        everyone = [steps]
        if world() > 1 and any(bad for bad, _ in verdicts):  # on which all agree; the first one writes the log
            everyone = [steps] * world()
            dist.all_gather_object(everyone, steps)
        for place, (bad, _) in enumerate(verdicts):
            if not bad:
                continue
            self.skipped += 1
            blamed = [process for process, own in enumerate(everyone) if own[place][1]]
            named = {process: shorten(everyone[process][place][2], 20) for process in blamed or range(len(everyone))}
            cases = [text if world() == 1 else f"{text} (process {process})" for process, text in named.items()]
            self.tell(
                f"{'the objective' if blamed else 'a gradient'} was not finite at step {steps[place][0]}: the batch "
                f"changed nothing ({self.skipped} of at most {self.limit} skipped); cases: {', '.join(cases)}"
            )
        self._pending.clear()

    @property
    def problem(self) -> str:
        """Why the run must end, '' if it need not; the same in every process."""
        if self.skipped <= self.limit:
            return ""
        return (
            f"the objective or its gradients were not finite in {self.skipped} batches, more than "
            f"nnssl_ext.max_nonfinite_batches={self.limit} allows; the log names their cases. Look at these, and start "
            f"anew with a lower nnssl_ext.learning_rate, or raise max_nonfinite_batches and go on with --c"
        )

    @torch.no_grad()
    def sound(self) -> bool:
        """Whether every weight and buffer is finite: only then it is worth keeping."""
        state = [*self.method.parameters(), *self.method.buffers()]
        return all(bool(torch.isfinite(tensor).all()) for tensor in state)
