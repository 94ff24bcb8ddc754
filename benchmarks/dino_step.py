"""Time one student step of 3DINO, against the bare blocks and heads on the same tokens.

``OMP_NUM_THREADS=2 python -m benchmarks dino_step --repeats 5``

A ViT-S (384 wide, 12 blocks, 6 heads, tokens of 16 voxels) on 4 volumes: 2 global crops of 96 and 8 local crops of 48
each, half of the global ones with 20 to 75 % of their tokens masked; heads 2048-256-65536 on both levels; float32. The
teacher's vectors are given to both sides: what is timed is the student. Bare is the same blocks on the same embedded
tokens, the same heads on as many rows and the product with the prototypes, and their backward pass; no embedding, no
targets, no loss but a sum. The two take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Figure, cpu, in_turns, parser, ratios, report
from nnssl_ext.host_memory import keep_memory
from nnssl_ext.losses.distillation import Targets, koleo
from nnssl_ext.losses.fused import prototype_cross_entropy
from nnssl_ext.methods.dino.networks import DistilledNetwork, reader_of
from nnssl_ext.networks.architectures.vit import ViTUNETR
from nnssl_ext.networks.backbone import backbone_of
from nnssl_ext.views.multicrop import draw_patch_masks
from nnssl_ext.views.random import BatchRandom

VOLUMES, LOCALS, PROTOTYPES = 4, 8, 65536


class Step:
    """One student step on fixed input."""

    def __init__(self, prototypes: int = PROTOTYPES, drop_path: float = 0.0) -> None:
        torch.manual_seed(0)
        network = ViTUNETR(input_channels=1, num_classes=2, embed_dim=384, depth=12, num_heads=6, drop_path=drop_path)
        reader = reader_of(backbone_of(network), 0)
        self.student = DistilledNetwork(reader, hidden_dim=2048, bottleneck_dim=256, prototypes=prototypes)
        self.whole = torch.randn(VOLUMES * 2, 1, 96, 96, 96)
        self.local = torch.randn(VOLUMES * LOCALS, 1, 48, 48, 48)
        random = BatchRandom(0, 0, range(VOLUMES), torch.device("cpu"))
        self.masked = draw_patch_masks(random, 2, 216, 0.5, (0.2, 0.75)).flatten(0, 1)
        self.index = self.masked.flatten().nonzero()[:, 0]
        self.pairs = torch.ones(2 + LOCALS, 2)
        self.pairs[:2].fill_diagonal_(0)
        self.pairs /= self.pairs.sum()
        self.prototypes = F.normalize(torch.randn(prototypes, 256), dim=-1)
        self.teacher_output = F.normalize(torch.randn(VOLUMES, 2, 256), dim=-1)
        self.teacher_patches = F.normalize(torch.randn(len(self.index), 1, 256), dim=-1)

    def ours(self) -> Tensor:
        """Return the loss as the method computes it."""
        student = self.student
        features, patches = student.reader(self.whole, self.masked)
        local, _ = student.reader(self.local)
        own = torch.cat([student.image_head(v).unflatten(0, (VOLUMES, -1)) for v in (features, local)], 1)
        predicted = student.patch_head(patches.flatten(0, 1)[self.index])[:, None]
        bias = self.prototypes.new_zeros(len(self.prototypes))
        image, _ = prototype_cross_entropy(
            own,
            student.image_head.prototype_weight,
            Targets(self.teacher_output, self.prototypes, bias, 0.05),
            self.pairs,
            0.1,
        )
        cell, _ = prototype_cross_entropy(
            predicted,
            student.patch_head.prototype_weight,
            Targets(self.teacher_patches, self.prototypes, bias, 0.05),
            torch.ones(1, 1),
            0.1,
        )
        views = features.unflatten(0, (VOLUMES, 2)).unbind(1)
        spread = sum(koleo(view, view, torch.arange(VOLUMES)).mean() for view in views)
        return image + cell + 0.1 * spread

    def bare(self) -> Tensor:
        """Return the sum of the outputs of the same blocks and heads."""
        encoder: Any = self.student.reader.network.backbone
        ends = []
        with torch.no_grad():
            inputs = [encoder.embed(self.whole, self.masked), encoder.embed(self.local)]
        for tokens in inputs:
            tokens = tokens.requires_grad_()
            for block in encoder.blocks:
                tokens = block(tokens)
            ends.append(tokens)
        image = self.student.image_head.mlp(torch.cat([end[:, 0] for end in ends]))
        cell = self.student.patch_head.mlp(ends[0][:, 1:].flatten(0, 1)[self.index])
        heads = (self.student.image_head, image), (self.student.patch_head, cell)
        return torch.stack([(vectors @ head.prototype_weight.T).sum() for head, vectors in heads]).sum()


def passes(step: Step, loss: Callable[[], Tensor]) -> None:
    """Do a forward and a backward pass."""
    step.student.zero_grad(set_to_none=True)
    loss().backward()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--prototypes", type=int, default=PROTOTYPES)
    options.add_argument("--drop-path", type=float, default=0.0, help="3DINO publishes 0.3")
    arguments = options.parse_args()
    keep_memory("cpu")  # as our trainers do
    step = Step(arguments.prototypes, arguments.drop_path)
    step.student.train()
    turns = {"ours": partial(passes, step, step.ours), "bare": partial(passes, step, step.bare)}
    costs = in_turns(turns, arguments.repeats)
    rows = [
        {
            "step": name,
            "masked patches": len(step.index),
            "CPU s": cpu(found, digits=2),
            "wall s": Figure(tuple(cost.wall for cost in found), 2),
            "over bare": ratios(found, costs["bare"]),
        }
        for name, found in costs.items()
    ]
    report(rows, arguments.json)


if __name__ == "__main__":
    main()
