"""Resolution that each method's network sees: voxels of the plan per voxel of a view.

    python -m benchmarks resolution -d 802 [-p nnUNetPlans] [--samples 60]

1 is the resolution of fine-tuning. Less is magnified, more is coarser. The number of a view is the cube root of the
volume of the case that one of its voxels covers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from benchmarks.views import dataset_of, views_of
from nnssl_ext.data.crops import collate
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.methods import METHODS, Method
from nnssl_ext.training.checks import check_plans, target_backbone
from nnssl_ext.views.spatial import SourceBox

#: Functions that cut views out of boxes. Their first argument is the boxes.
CUTTERS = {"crop_batch": 1, "cut_patches": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", default="802", help="data set, preprocessed")
    parser.add_argument("-p", default="nnUNetPlans", help="plans")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("--samples", type=int, default=60, help="samples of each method")
    arguments = parser.parse_args()

    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    base = Path(str(nnUNet_preprocessed)) / maybe_convert_to_dataset_name(arguments.d)
    plans, dataset = (json.loads((base / f"{name}.json").read_text()) for name in (arguments.p, "dataset"))
    manager = PlansManager(plans)
    configuration = manager.get_configuration(arguments.c)
    index = CaseIndex.build(base / configuration.data_identifier)
    print("| method | edges of a view | median | 10 to 90 % |\n|---|---|---|---|")
    for name, method in METHODS.items():
        if method.learns_from == "cases":
            _, settings, geometry, _ = check_plans(method, plans, arguments.c, dataset)
            backbone = target_backbone(manager, configuration, geometry.channels, 2)
            geometry = replace(geometry, case_size=index.common_size())
            found = resolutions(method(backbone, settings, geometry), index, arguments.samples)
            for size, values in found.items():
                low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
                print(f"| {name} | {' x '.join(map(str, size))} | {middle:.2f} | {low:.2f} to {high:.2f} |", flush=True)


def resolutions(method: Method, index: CaseIndex, samples: int) -> dict[tuple[int, ...], list[float]]:
    """Measure voxels of the plan per voxel of a view.

    Args:
        method: The method.
        index: The cases.
        samples: Number of samples to draw.

    Returns:
        Values by the edges of views.
    """
    found: dict[Any, list[float]] = defaultdict(list)
    data = dataset_of(method, index)

    def spied(function: Any, place: int) -> Any:
        def cut(boxes: Sequence[SourceBox], *arguments: Any, **options: Any) -> Any:
            size = tuple(map(int, arguments[place - 1]))
            found[size] += [abs(np.linalg.det(box.matrix)) ** (1 / 3) for box in boxes]
            return function(boxes, *arguments, **options)

        return cut

    with ExitStack() as stack:
        for module in [m for name, m in sys.modules.items() if name.startswith("nnssl_ext.")]:
            for cutter, place in CUTTERS.items():
                if hasattr(module, cutter):
                    stack.enter_context(patch.object(module, cutter, spied(getattr(module, cutter), place)))
        for first in range(0, samples, 2):
            views_of(method, collate([data[first], data[first + 1]]), torch.device("cpu"))
    return dict(found)


if __name__ == "__main__":
    main()
