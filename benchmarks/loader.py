"""Time the loader on large volumes, against only reading the same boxes.

    python -m benchmarks loader [--shape 320 512 512] [--edges 64 128]

Volumes are stored as nnU-Net stores them (.b2nd, LZ4HC, chunks for a 128^3 patch). "alone" only opens the file and
reads the boxes that our samples read. Both take turns in one process and one thread, with a warm file cache. "turned"
draws VolumeFusion's rotations and zooms, whose boxes are larger. The workers' column counts the CPU seconds of all
processes.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import torch

from benchmarks.measure import Figure, cpu, in_turns, parser, ratios, report
from benchmarks.workload import DATA, write_cases
from nnssl_ext.data import crops
from nnssl_ext.data.crops import Crop, CropDataset, CropRequest
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.data.loader import Shard, SteadyLoader
from nnssl_ext.environment import cores
from nnssl_ext.views.spatial import SpatialRange

ISOTROPIC = (1.0, 1.0, 1.0)
#: VolumeFusion's default spatial views, never and always turned.
STRAIGHT = SpatialRange(ISOTROPIC, flip=0.5)
TURNED = SpatialRange(ISOTROPIC, flip=0.5, affine=1.0, rotation=15.0, zoom=(0.8, 1.25))


def boxes_of(dataset: CropDataset, samples: int) -> list[tuple[str, tuple[slice, ...]]]:
    """Return the file and the slices that each sample reads, redraws included."""
    found: list[tuple[str, tuple[slice, ...]]] = []
    original = crops.open_case

    class Recorded:
        def __init__(self, folder: Path, case: str) -> None:
            self.array, self.path = original(folder, case), str(folder / f"{case}.b2nd")
            self.shape = self.array.shape

        def __getitem__(self, key: tuple[slice, ...]) -> Any:
            found.append((self.path, tuple(slice(k.start and int(k.start), k.stop and int(k.stop)) for k in key)))
            return self.array[key]

    crops.open_case = Recorded
    try:
        for sample in range(samples):
            dataset[sample]
    finally:
        crops.open_case = original
    return found


def alone(boxes: list[tuple[str, tuple[slice, ...]]]) -> None:
    """Open the files and read the boxes."""
    for path, key in boxes:
        blosc2.open(path, mode="r", dparams={"nthreads": 1}, mmap_mode="r")[key]


def read(dataset: CropDataset, samples: int) -> None:
    """Read samples as a worker does."""
    for sample in range(samples):
        dataset[sample]


def with_workers(dataset: CropDataset, workers: int, batches: int, batch_size: int = 2) -> tuple[float, float]:
    """Return the crops a second, and the CPU seconds a crop of all processes."""

    def spent() -> float:
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, kinds))

    shard = Shard(0, batches, batch_size)
    pinned = torch.cuda.is_available()  # as in a training
    loader = SteadyLoader(dataset, shard, workers=workers, pin_memory=pinned, log=print, waiting=lambda: None)
    before, begin, wall, first = spent(), time.perf_counter(), 0.0, min(workers + 1, batches // 2)
    for made, _ in enumerate(loader, 1):
        if made == first:  # the workers have started, and what they made while starting is taken
            begin = time.perf_counter()
        if made == batches:
            wall = time.perf_counter() - begin
    return (batches - first) * batch_size / wall, (spent() - before) / (batches * batch_size)


def rows(index: CaseIndex, edge: int, samples: int, repeats: int, workers: int) -> list[dict[str, object]]:
    """Return the rows of one crop edge."""
    result: list[dict[str, object]] = []
    for name, spread in {"straight": STRAIGHT, "turned": TURNED}.items():
        dataset = CropDataset(index, index.cases, CropRequest((Crop((edge,) * 3, spread),)), seed=0)
        boxes = boxes_of(dataset, samples)
        turns: dict[str, Callable[[], object]] = {
            "ours": lambda dataset=dataset: read(dataset, samples),  # type: ignore[misc]
            "alone": lambda boxes=boxes: alone(boxes),  # type: ignore[misc]
        }
        costs = in_turns(turns, repeats)
        measured = [with_workers(dataset, workers, samples) for _ in range(repeats)]
        result.append(
            {
                "crop": f"{edge}^3 {name}",
                "CPU ms a crop": cpu(costs["ours"], per=samples / 1000, digits=2),
                "alone, ms": cpu(costs["alone"], per=samples / 1000, digits=2),
                "ratio": ratios(costs["ours"], costs["alone"]),
                f"crops/s, {workers} workers": Figure(tuple(m[0] for m in measured), 0),
                "CPU ms a crop, all processes": Figure(tuple(1000 * m[1] for m in measured), 2),
            }
        )
    return result


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", type=int, nargs=3, default=[320, 512, 512], help="voxels of a volume")
    options.add_argument("--edges", type=int, nargs="+", default=[64, 128], help="edges of the crops")
    options.add_argument("--cases", type=int, default=3)
    options.add_argument("--samples", type=int, default=24, help="crops of a measurement")
    options.add_argument("--workers", type=int, default=min(2, cores()))
    arguments = options.parse_args()
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / DATA
        write_cases(data, tuple(arguments.shape), arguments.cases, [128, 128, 128])
        index = CaseIndex.build(data, workers=0, show_progress=False)
        report(
            [
                row
                for edge in arguments.edges
                for row in rows(index, edge, arguments.samples, arguments.repeats, arguments.workers)
            ],
            arguments.json,
        )


if __name__ == "__main__":
    main()
