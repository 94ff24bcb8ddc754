"""Numbers that are not finite, through stock's code path: the batch changes nothing, is named, and the run goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnssl_ext import checkpoint
from nnssl_ext.errors import UserError
from nnssl_ext.methods.volume_fusion import VolumeFusion
from nnssl_ext.training.run.nonfinite import READ_EVERY, FiniteGuard
from tests.conftest import Environment
from tests.support.processes import ranks
from tests.support.runs import pretrain, same_run

Data = Callable[[str], Environment]


RUN = {"epochs": 2, "iterations_per_epoch": 4}


def spoil(monkeypatch: pytest.MonkeyPatch, calls: range, value: float = float("nan")) -> None:
    """The objective of these training steps is not finite."""
    original, count = VolumeFusion.forward, iter(range(10**6))

    def forward(self: VolumeFusion, views: dict[str, Tensor]) -> dict[str, Tensor]:
        terms = original(self, views)
        if self.training and next(count) in calls:
            terms = {**terms, "loss": terms["loss"] * value}
        return terms

    monkeypatch.setattr(VolumeFusion, "forward", forward)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_batch_is_named_and_changes_nothing(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", RUN)
    with monkeypatch.context() as patch:
        spoil(patch, range(2, 3), value)
        fold = pretrain(environment, "plain", "run")
    log = next(fold.glob("training_log_*.txt")).read_text()
    assert "the objective was not finite at step 3: the batch changed nothing (1 of at most 10 skipped); cases: " in log
    content = checkpoint.load(fold / "checkpoint_final.pth")
    assert content["nnssl_ext"]["counters"] == {"step": 8, "samples": 16, "nonfinite": 1}
    assert all(torch.isfinite(torch.tensor(values)).all() for values in content["logging"].values())
    assert all(torch.isfinite(tensor).all() for tensor in content["network_weights"].values())
    moments = content["optimizer_state"]["state"].values()
    assert {int(state["step"]) for state in moments} == {7}
    assert all(torch.isfinite(state["exp_avg"]).all() for state in moments)


def test_too_many_stop_with_the_last_good_state(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("plain")
    for plans in ("whole", "broken"):
        environment.write_plans("plain", plans, {**RUN, "max_nonfinite_batches": 2})
    with monkeypatch.context() as patch:
        spoil(patch, range(1, 4))
        with pytest.raises(
            UserError, match="in 3 batches, more than nnssl_ext.max_nonfinite_batches=2 allows"
        ) as error:
            pretrain(environment, "plain", "broken")
    assert "\n" not in str(error.value)
    fold = next(environment.results.glob("*/*broken*/fold_0"))
    kept = checkpoint.load(fold / "checkpoint_latest.pth")
    assert all(torch.isfinite(tensor).all() for tensor in kept["network_weights"].values())
    assert kept["nnssl_ext"]["counters"]["step"] == 4
    # raised, it goes on, and equals a run that never stopped
    for plans in ("whole", "broken"):
        environment.write_plans("plain", plans, {**RUN, "max_nonfinite_batches": 3})
    with monkeypatch.context() as patch:
        spoil(patch, range(1, 4))
        whole = pretrain(environment, "plain", "whole")
    same_run(whole, pretrain(environment, "plain", "broken", c=True))


#: More than between two readings.
STEPS = 20


class Small(nn.Module):
    center: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3)
        self.register_buffer("center", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.layer(x))
        self.center.lerp_(y.detach().mean(0), 0.1)
        return y.square().mean()


def steps_of(optimiser: str, bad: set[int], fused: bool) -> tuple[dict[str, Tensor], list[str], list[int]]:
    torch.manual_seed(0)
    model, told = Small(), list[str]()
    options = {"fused": True} if fused else {}
    kinds: dict[str, Any] = {"adam": torch.optim.AdamW, "sgd": lambda p, **o: torch.optim.SGD(p, momentum=0.9, **o)}
    adam = kinds[optimiser](model.parameters(), lr=1e-2, **options)
    if optimiser == "sgd":  # as build_optimizer: a fused first step that is skipped would leave them uninitialized
        adam.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in model.parameters()})
    guard = FiniteGuard(model, adam, 10, told.append)
    guard.defers = lambda verdict: fused  # type: ignore[method-assign]  # as on a GPU
    data, waiting, calls = torch.randn(STEPS, 5, 3), list[int](), 0
    for step in range(STEPS):
        adam.zero_grad()
        with guard.step(step, [f"case {step}"]) as allows:
            loss = model(data[step] * (float("nan") if step in bad else 1.0))
            loss.backward()
            if allows(loss, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
                adam.step()
                calls += 1
        waiting.append(len(guard._pending))
    assert calls == (STEPS if fused else STEPS - len(bad))
    guard.read()
    steps = {f"step {n}": state["step"] for n, state in enumerate(adam.state.values()) if "step" in state}
    return {**model.state_dict(), **steps}, told, waiting


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_a_fused_optimiser_skips_by_itself_and_buffers_are_as_before(optimiser: str) -> None:
    """What happens on a GPU, where the host does not wait for the verdict."""
    for bad in ({0, 5}, {3, 4, 18}):
        fused, told, waiting = steps_of(optimiser, bad, fused=True)
        host, same, read_at_once = steps_of(optimiser, bad, fused=False)
        assert told == same
        assert waiting == [(step + 1) % READ_EVERY for step in range(STEPS)]
        assert not any(read_at_once)
        assert len(told) == len(bad)
        assert f"cases: case {min(bad)}" in told[0]
        for name, tensor in host.items():
            assert torch.isfinite(tensor).all()
            torch.testing.assert_close(fused[name], tensor, rtol=1e-3, atol=1e-5)


def test_overflows_of_a_scaler_do_not_count() -> None:
    model, told = nn.Linear(2, 2), list[str]()
    guard = FiniteGuard(model, torch.optim.SGD(model.parameters(), 0.1), 10, told.append)
    with guard.step(0, ["a"]) as allows:
        assert allows(torch.tensor(1.0), None)  # whatever the gradients are
    assert not told
    with guard.step(1, ["b"]) as allows:
        allows(torch.tensor(float("nan")), None)
    assert "cases: b" in told[0]


def _judging(rank: int, world: int, port: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    network, told = nn.Linear(2, 1), list[str]()
    guard = FiniteGuard(network, torch.optim.SGD(network.parameters(), 0.1), 10, told.append)
    for step, values in enumerate([(1.0, torch.nan), (1.0, 1.0), (torch.inf, 1.0)], 1):
        with guard.step(step, [f"case_{rank}_{step}"]) as allows:
            assert allows(torch.tensor(values[rank]), torch.tensor(1.0)) == (step == 2)
    (folder / str(rank)).write_text("\n".join(told))
    dist.destroy_process_group()


def test_the_process_with_the_bad_batch_is_named_in_all(tmp_path: Path) -> None:
    assert ranks(2, _judging, tmp_path) == [0, 0]
    first, second = ((tmp_path / name).read_text() for name in "01")
    assert first == second
    lines = first.splitlines()
    assert [line.rpartition("cases: ")[2] for line in lines] == ["case_1_1 (process 1)", "case_0_3 (process 0)"]
    assert "the objective was not finite at step 1" in lines[0]
