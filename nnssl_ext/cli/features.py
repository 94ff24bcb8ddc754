"""Extract feature vectors and feature maps with a pretrained encoder.

    nnssl_ext features CHECKPOINT -d 4 -o OUT                    one vector for each training case of a data set
    nnssl_ext features CHECKPOINT -i FOLDER -o OUT --stage all   images in a folder, all stages of the encoder
    nnssl_ext features CHECKPOINT -d 4 -o OUT --classify labels.csv     how well do the vectors tell labels apart?

CHECKPOINT is what nnssl_ext transfer takes. Images are cropped, resampled and normalized by the plans: those of the
data set (-d), of the checkpoint (-i), or of -p. The window slides as in nnU-Net's prediction. Calling again continues.

Do not choose weights for segmentation by these features: frozen features rank convolutional encoders wrongly.
nnssl_ext study answers that. The page is docs/how-to/features.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.errors import UserError

if TYPE_CHECKING:
    from nnssl_ext.features.window import Encoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="file, folder, Hugging Face repository or known source")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("-d", metavar="DATASET", help="name or ID of a planned data set: its training cases")
    images.add_argument("-i", metavar="FOLDER", help="folder of images, CASE_0000.nii.gz as for nnUNetv2_predict")
    add("-o", required=True, metavar="OUT", help="folder to write")
    add("--stage", default="last", metavar="N|all", help="stage of the encoder, 0 is the finest (default: the last)")
    add("--pool", choices=("mean", "max", "octants", "mask"), default="mean", help="how a map becomes a vector (mean)")
    add(
        "--mask", metavar="PATH", help="label maps for --pool mask: folder, or one file; default: the data set's labels"
    )
    add("--maps", nargs="?", const=0, type=int, metavar="K", help="write maps: K principal components, or all channels")
    add("-c", metavar="CONFIGURATION", help="default: the checkpoint's, or 3d_fullres")
    add("-p", metavar="PLANS", help="name of the data set's plans (default: the checkpoint's), or with -i a plans file")
    add("-tr", metavar="TRAINER", help="trainer that builds the network, such as nnUNet_Primus_M_Trainer")
    add("-device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--batch", type=int, metavar="N", help="tiles per pass (default: the plans' batch size)")
    add("--parquet", action="store_true", help="write features.parquet instead of features.csv; needs pyarrow")
    add("--classify", metavar="CSV", help="table with columns case and label: cross-validate simple classifiers")
    add("--group-by", metavar="WORD", help="column of that table, or regular expression on case names, for --classify")
    add("--allow-partial", action="store_true", help="accept that less than a tenth of the encoder is filled")


def run(arguments: argparse.Namespace) -> None:
    import torch

    from nnssl_ext.environment import check_device, default_device
    from nnssl_ext.features import results
    from nnssl_ext.features.classify import read_labels
    from nnssl_ext.features.extract import Extraction
    from nnssl_ext.features.plans import dataset_plans, recorded_plans
    from nnssl_ext.features.window import Encoder
    from nnssl_ext.files import lock_file
    from nnssl_ext.transfer.read import read_source
    from nnssl_ext.transfer.target import build_target
    from nnssl_ext.transfer.transfer import transfer

    device, folder, preprocessed = arguments.device or default_device(), Path(arguments.o).expanduser(), None
    check_device(device)
    if arguments.mask and arguments.pool != "mask":
        raise UserError(f"Expected --pool mask with --mask, got --pool {arguments.pool}. Add --pool mask")
    if arguments.group_by and not arguments.classify:
        raise UserError("Expected --classify with --group-by, got none. Add --classify LABELS.csv")
    if min(1 if arguments.batch is None else arguments.batch, 1 + (arguments.maps or 0)) < 1:
        raise UserError("Expected --batch of at least 1 and --maps of at least 0. Give other numbers")
    labels = read_labels(Path(arguments.classify), arguments.group_by) if arguments.classify else None
    source = read_source(arguments.checkpoint)
    chosen = (arguments.c, arguments.tr)
    if arguments.d:
        preprocessed, plans = dataset_plans(source, arguments.d, arguments.p, *chosen)
    else:
        plans = recorded_plans(source, Path(arguments.p) if arguments.p else None, *chosen)
    target = build_target(plans, 0)
    report = transfer(source, target, allow_partial=arguments.allow_partial)
    if target.backbone is None:
        raise UserError(
            f"Expected a network with a known encoder, got {type(target.network).__name__}. Give other plans"
        )
    encoder = Encoder(target.backbone, target.patch_size, device)
    stages = _stages(arguments.stage, encoder)
    cases, names = _cases(arguments, plans, preprocessed)
    print(f"{source.path} ({source.kind})\n{report.encoder_share:.1%} of the encoder come from it")
    if report.encoder_share < 1:
        print(
            "WARNING: the rest of the encoder has random values. Features of an encoder in parts are hard to interpret."
        )
    for remark in report.remarks:
        print(remark)
    print(f"{len(cases)} cases, plans {plans.plans.plans_name}, {plans.configuration_name}")
    batch = arguments.batch or plans.configuration.batch_size
    extraction = Extraction(encoder, plans, stages, arguments.pool, names, arguments.maps, batch, folder)
    settings = results.settings(source, extraction, report)
    with lock_file(folder / ".lock", str(folder)):
        results.check_settings(folder, settings)
        try:
            vectors, failed = extraction.run(cases)
        except torch.OutOfMemoryError as error:
            raise UserError("the GPU's memory is too small. Give --batch 1 or -device cpu") from error
        for line in failed:
            print(line, file=sys.stderr)
        if vectors or not failed:
            results.write(folder, settings, vectors, labels, arguments.parquet)
    if failed:
        more = f" and {len(failed) - 1} more cases failed" if len(failed) > 1 else ""
        raise UserError(f"{failed[0]}{more}. Repair the files and call again: finished cases are kept")


def _stages(word: str, encoder: Encoder) -> list[int]:
    count = len(encoder.strides)
    if word in ("all", "last"):
        return list(range(count)) if word == "all" else [count - 1]
    if not word.isdigit() or int(word) >= count:
        known = ", ".join(
            f"{number} (stride {'x'.join(map(str, stride))}, {channels} channels)"
            for number, (stride, channels) in enumerate(zip(encoder.strides, encoder.channels, strict=True))
        )
        raise UserError(f"Expected a stage of the encoder or all, got '{word}'. Choose from {known}")
    return [int(word)]


def _cases(arguments: argparse.Namespace, plans: Any, preprocessed: Path | None) -> tuple[list, dict[int, str]]:
    """List the cases, with label maps where they are pooled over, and the names of these labels."""
    from dataclasses import replace

    from nnssl_ext.features.cases import dataset_cases, image_cases, region_names, with_masks

    if preprocessed is None:
        cases = image_cases(Path(arguments.i).expanduser(), plans)
    else:
        original = arguments.maps is not None or arguments.mask is not None
        folder = os.environ.get("nnUNet_raw")  # only --maps and --mask need it
        raw = Path(folder) / preprocessed.name if folder else None
        cases = dataset_cases(raw if raw and raw.is_dir() else None, preprocessed, plans, original)
    if arguments.pool != "mask":
        return [replace(case, mask=None) for case in cases], {}
    if arguments.mask:
        return with_masks(cases, Path(arguments.mask).expanduser(), plans), {}
    unlabeled = [case.name for case in cases if case.mask is None]
    if unlabeled:
        raise UserError(f"Expected a label map of each case, got none of {unlabeled[0]}. Give them by --mask")
    return cases, region_names(plans.dataset_json)
