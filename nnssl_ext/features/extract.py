"""Extract the features of cases into a folder.

An interrupted call can go on, since each case is kept when it is finished. The folder holds features.csv (or .parquet)
and features.json, features.png and map.png, and maps/ if asked for.
``cases/`` keeps the vectors of each finished case, and ``basis.npz`` the principal axes of the first.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nnssl_ext.errors import UserError
from nnssl_ext.features import maps
from nnssl_ext.features.cases import Case, Preprocessed, preprocess
from nnssl_ext.features.pictures import draw_map
from nnssl_ext.features.pooling import masks, pooled
from nnssl_ext.features.window import Encoder, Grid, feature_maps
from nnssl_ext.files import replaced_on_success
from nnssl_ext.transfer.target import TargetPlans

#: Region -> stage -> vector.
Vectors = dict[str, dict[int, np.ndarray]]
#: ``components`` for all channels instead of principal components.
ALL = 0


@dataclass(frozen=True)
class Extraction:
    """Extract vectors, maps and pictures of cases.

    Attributes:
        encoder: The filled encoder.
        plans: The plans for preprocessing.
        stages: Numbers of the stages.
        pool: One of ``POOLS``.
        names: Names of the labels that ``mask`` pools over.
        components: Principal components of the maps to write, ``ALL`` channels, or None for no maps.
        batch: Tiles per pass.
        folder: The folder to write.
    """

    encoder: Encoder
    plans: TargetPlans
    stages: Sequence[int]
    pool: str
    names: Mapping[int, str]
    components: int | None
    batch: int
    folder: Path

    def run(self, cases: Sequence[Case]) -> tuple[dict[str, Vectors], list[str]]:
        """Extract all cases that are not done yet.

        Returns:
            Case -> vectors, and one line for each case that failed.
        """
        (self.folder / "cases").mkdir(exist_ok=True)
        found = {case.name: self._finished(case) for case in cases}
        missing = [case for case in cases if not found[case.name]]
        failed = []
        for case, future in tqdm(_prefetched(missing, self.plans), total=len(missing), desc="cases"):
            try:
                found[case.name] = self._extract(case, future.result())
            except UserError as error:
                failed.append(error.line)
        return {name: vectors for name, vectors in found.items() if vectors}, failed

    def _extract(self, case: Case, loaded: Preprocessed) -> Vectors:
        encoder, pool = self.encoder, self.pool
        grid = Grid.of(loaded.image.shape[1:], encoder.patch, encoder.strides[-1])
        found = feature_maps(encoder, loaded.image, grid, self.stages, self.batch, case.name)
        regions = masks(pool, grid.shape, loaded.labels, self.names)
        vectors = pooled(found, regions, grid, encoder.strides, largest=pool == "max")
        basis = self._basis(case, loaded, found, grid)
        if self.components is not None:
            self._write_maps(case, loaded, found, grid, basis)
        arrays = {region: {stage: v.numpy() for stage, v in stages.items()} for region, stages in vectors.items()}
        stacked = {f"stage{s}": np.stack([arrays[region][s] for region in arrays]) for s in self.stages if arrays}
        _save(self._file(case), signature=np.array(case.signature), regions=np.array(list(arrays), str), **stacked)
        return arrays

    def _file(self, case: Case) -> Path:
        return self.folder / "cases" / f"{case.name}.npz"

    def _finished(self, case: Case) -> Vectors:
        """Read the vectors of a finished case. Empty if it is new, has changed or has no finite vectors."""
        if not self._file(case).is_file():
            return {}
        with np.load(self._file(case), allow_pickle=False) as stored:
            finite = all(np.isfinite(stored[f"stage{s}"]).all() for s in self.stages)
            if str(stored["signature"]) != case.signature or not finite:
                return {}
            regions = stored["regions"].tolist()
            return {region: {s: stored[f"stage{s}"][row] for s in self.stages} for row, region in enumerate(regions)}

    def _basis(
        self, case: Case, loaded: Preprocessed, found: Mapping[int, Tensor], grid: Grid
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the principal axes of each stage.

        They are those of the first case, so that maps of all cases can be compared. Its map is drawn, too.
        """
        file = self.folder / "basis.npz"
        if not file.is_file():
            image = torch.ones(grid.shape)
            basis = {
                stage: maps.principal_axes(features, grid.share(image, self.encoder.strides[stage]))
                for stage, features in found.items()
            }
            colors = {
                stage: maps.enlarge(maps.project(features, basis[stage], 3), grid).numpy()
                for stage, features in found.items()
            }
            spacing = self.plans.configuration.spacing[-2:]
            draw_map(loaded.image[0].numpy(), colors, spacing[0] / spacing[1], case.name, self.folder / "map.png")
            _save(
                file, **{f"{n}{stage}": t.numpy() for stage, b in basis.items() for n, t in zip("ma", b, strict=True)}
            )
        with np.load(file, allow_pickle=False) as stored:
            return {s: (torch.from_numpy(stored[f"m{s}"]), torch.from_numpy(stored[f"a{s}"])) for s in self.stages}

    def _write_maps(
        self,
        case: Case,
        loaded: Preprocessed,
        found: Mapping[int, Tensor],
        grid: Grid,
        basis: Mapping[int, tuple[Tensor, Tensor]],
    ) -> None:
        """Write the maps of a case on its image's grid."""
        target = self.folder / "maps"
        target.mkdir(exist_ok=True)
        for stage, features in found.items():
            values = maps.project(features, basis[stage], self.components) if self.components else features
            needed = 4 * len(values) * int(np.prod(loaded.properties["shape_before_cropping"]))
            free = shutil.disk_usage(target).free
            if needed > free:
                raise UserError(
                    f"case {case.name}: Expected {needed / 2**30:.1f} GiB for the map of stage {stage}, got "
                    f"{free / 2**30:.1f} GiB free. Write principal components with --maps 3"
                )
            # channel by channel, since resampling takes several times the memory of its input
            volumes = [maps.on_image(maps.enlarge(v[None], grid), loaded.properties, self.plans) for v in values]
            affine = maps.affine_of(loaded.properties)
            maps.write_nifti(np.concatenate(volumes), affine, target / f"{case.name}_stage{stage}.nii.gz")


def _prefetched(cases: Sequence[Case], plans: TargetPlans) -> Iterator[tuple[Case, Future[Preprocessed]]]:
    """Preprocess the next case while the current one is computed."""
    with ThreadPoolExecutor(1) as pool:
        futures = (pool.submit(preprocess, case, plans) for case in cases)
        upcoming = next(futures, None)
        for case in cases:
            current, upcoming = upcoming, next(futures, None)
            assert current is not None
            yield case, current


def _save(path: Path, **arrays: Any) -> None:
    with replaced_on_success(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
