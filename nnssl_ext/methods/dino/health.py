"""What 3DINO's validation crops tell together: of hidden cells, of the targets, of a collapse.

B samples of a batch, n of a validation, F features, E width of a projected vector, N cells of a view, M hidden cells.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.losses.distillation import MAX_LOGITS, Targets, target_distributions
from nnssl_ext.losses.gather import gather_samples
from nnssl_ext.losses.health import (
    effective_rank,
    entropies,
    feature_deviation,
    off_diagonal_cosine,
    retrieval_accuracy,
)
from nnssl_ext.methods.dino.settings import DINOSettings

#: Signs of collapse: targets of images and of cells both say less than this, in nats (uniform ones are told from equal
#: ones by their entropy, as a share of the largest); directions in which images differ; mean cosine of their features.
LEAST_INFORMATION, MOST_ENTROPY, LEAST_RANK, MOST_COSINE = 0.005, 0.9, 1.5, 0.9999
#: Fewer samples in a validation tell nothing of a collapse.
FEWEST_SAMPLES = 4
#: Cells of a view that are looked at, and samples of a validation at most: each of their cells is compared with all
#: others, and with every prototype.
SEEN_CELLS, SEEN_SAMPLES = 32, 128


def seen_cells(number: int) -> Tensor:
    """Which of a view's cells are looked at: some of them all over it, the same ones at each validation."""
    order = np.random.default_rng(number).permutation(number)[:SEEN_CELLS]
    return torch.from_numpy(np.sort(order))


class Seen:
    """What the first validation batches of all processes showed."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, ...]] = []
        self._samples = 0

    def __repr__(self) -> str:
        return f"Seen({len(self._batches)} batches)"

    @torch.compiler.disable
    def add(self, total: int, features: Tensor, said: Tensor, guessed: Tensor, cells: Tensor, hidden: Tensor) -> None:
        """Keep a batch, or what fits of it.

        Args:
            total: Samples of the batch over all processes.
            features: (2 B, F) of the teacher's global views.
            said: (B, 2, E), what the teacher says of them.
            guessed, cells: (2 B, N, E), what the student and the teacher say of some of their cells.
            hidden: (2 B, N) bool, whether the student did not see them.
        """
        room = SEEN_SAMPLES - self._samples
        if room <= 0:
            return
        parts = [part.unflatten(0, (len(said), -1)) for part in (features, guessed, cells, hidden.float())]
        batch = tuple(gather_samples(part, total)[0][:room] for part in (said, *parts))
        self._samples += len(batch[0])
        self._batches.append(batch)

    def measures(self, targets: Callable[[str, Tensor], Targets]) -> dict[str, float]:
        """What all batches tell together, and forget them.

        Args:
            targets: From "image" or "cell" and what the teacher says of them (n, 1, E) to their targets.
        """
        if not self._batches:
            return {}
        said, features, guessed, cells, hidden = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        self._batches.clear()
        self._samples = 0
        found = {"hidden_cells": told_cells(guessed.flatten(0, 1), cells.flatten(0, 1), hidden.flatten(0, 1) > 0)}
        for level, vectors in (("image", said.flatten(0, 1)), ("cell", cells.flatten(0, 2))):
            what = targets(level, vectors[:, None])
            rows = max(1, MAX_LOGITS // len(what.prototypes))
            pieces = (target_distributions(what._replace(vectors=v))[:, 0] for v in what.vectors.split(rows))
            found[f"{level}_entropy"], found[f"{level}_information"] = entropies(pieces)
        found |= {
            "view_retrieval": retrieval_accuracy(*said.unbind(1)),
            "feature_deviation": feature_deviation(features.flatten(0, 1)),
            "effective_rank": effective_rank(features[:, 0]),
            "off_diagonal_cosine": off_diagonal_cosine(features[:, 0]),
        }
        views = said.shape[0] * said.shape[1]
        return {name: value.item() for name, value in found.items()} | {
            "samples": float(len(said)),
            "chance": 1 / views,
        }


def told_cells(guessed: Tensor, cells: Tensor, hidden: Tensor) -> Tensor:
    """How often the student's vector of a hidden cell is nearest to the teacher's of that view, of all at its place.

    Other places of the same view are no candidates: where a cell lies a network knows from its padding, whatever the
    image shows.

    Args:
        guessed, cells: (V, N, E) of the student and of the teacher, in V views.
        hidden: (V, N) bool.
    """
    nearest = torch.einsum("vne,wne->nvw", guessed, cells).argmax(2)  # (N, V)
    right = (nearest == torch.arange(len(cells), device=cells.device)).T
    return (right & hidden).sum() / hidden.sum().clamp_min(1)


def sign_of_collapse(measures: dict[str, float], settings: DINOSettings) -> str:
    """The sign by which ``Seen.measures`` show a collapse, and what to change; '' if none."""
    if measures.get("samples", 0) < FEWEST_SAMPLES:
        return ""
    # what is not trained says something or nothing by chance; the image's term has no weight, it is always there
    levels = ["image", "cell"] if settings.cell_weight and settings.mask_probability else ["image"]
    informed = max(measures[f"{level}_information"] for level in levels)
    if informed < LEAST_INFORMATION:
        return _collapsed_targets(max(measures[f"{level}_entropy"] for level in levels), informed, settings)
    rank, cosine = measures["effective_rank"], measures["off_diagonal_cosine"]
    if rank < LEAST_RANK or cosine > MOST_COSINE:
        return (
            f"the features of all images are alike (effective rank {rank:.2f}, mean cosine {cosine:.5f}); raise "
            f"dino.koleo_weight (now {settings.koleo_weight}) or lower learning_rate"
        )
    return ""


def _collapsed_targets(entropy: float, information: float, settings: DINOSettings) -> str:
    now, said = settings.teacher_temperature, f"entropy {entropy:.3f} of the largest, {information:.4f} nats"
    if entropy > MOST_ENTROPY:
        return (
            f"the teacher's targets are uniform whatever it sees ({said} of information); lower "
            f"dino.teacher_temperature (now {now}) or learning_rate"
        )
    return (
        f"the teacher's targets are the same whatever it sees ({said} of information); let them be centred "
        f"(dino.centring, dino.centre_momentum below 1) or raise dino.teacher_temperature (now {now})"
    )
