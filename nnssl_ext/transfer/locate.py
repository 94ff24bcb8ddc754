"""Locate pretrained weights here or on Hugging Face."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json
from nnssl_ext.transfer.known_sources import KNOWN_SOURCES

WEIGHTS, PLAN, CONFIG, SAFETENSORS = "checkpoint_final.pth", "adaptation_plan.json", "config.json", "model.safetensors"
#: The entry of our safetensors files' metadata.
NOTE = "nnssl_ext_export"
#: nnssl's and nnU-Net's own variable: the folder that downloads go to.
DOWNLOADS = "nnssl_pretrained_models"
#: An adaptation plan is a few kilobytes. A much larger file is something else.
LARGEST_JSON = 4 * 2**20

_ADDRESS = re.compile(r"(?:https?://)?huggingface\.co/")
_REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+?)(?:(?:@|/tree/)(?P<revision>[\w./-]+?))?/?$")
#: Endings of files and of nnU-Net's folders, which no repository's name has.
_LOCAL = re.compile(r".*(\.(pth?|ckpt|tar|t?gz|zip|bin|model|safetensors|pkl|npz|h5|onnx|json)|/fold_(\d+|all))/?$")


def locate(text: str) -> tuple[Path, dict[str, Any]]:
    """Find the weights that ``text`` names and the plan beside them.

    Those in a Hugging Face repository are downloaded.

    Args:
        text: A file; a folder with checkpoint_final.pth or model.safetensors; ``owner/name``, ``owner/name@revision``
            or the repository's address; the short name of a known source.

    Raises:
        UserError: If there is nothing, or it cannot be downloaded.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        found = [path / name for name in (WEIGHTS, SAFETENSORS) if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} holds neither {WEIGHTS} nor {SAFETENSORS}. Name the file")
        return found[0], _plan_beside(found[0])
    if path.is_file():
        return path, _plan_beside(path)
    if text in KNOWN_SOURCES:
        known = KNOWN_SOURCES[text]
        if not known.repository:
            raise UserError(f"{text} has to be downloaded by hand from {known.address}. Give the file")
        return _download(known.repository, None, known.file)
    repository = _REPOSITORY.match(_ADDRESS.sub("", text))
    # what lies beside other files here is a mistyped path, not a question for Hugging Face
    mistyped = _LOCAL.match(text) or ("/" in text and Path(text.split("/")[0]).exists())
    if repository is None or (mistyped and not _ADDRESS.match(text)):
        raise UserError(
            f"{text} is no file, no folder and no Hugging Face repository (owner/name). nnssl_ext sources lists short "
            f"names"
        )
    return _download(repository["name"], repository["revision"])


def _plan_beside(weights: Path) -> dict[str, Any]:
    plan = weights.parent / PLAN
    return read_json(plan, most=LARGEST_JSON) if plan.is_file() else {}


def _download(name: str, revision: str | None, weights: str = "") -> tuple[Path, dict[str, Any]]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    root = os.environ.get(DOWNLOADS)
    if not root:
        raise UserError(f"{name} is no file here. To download it from Hugging Face, export {DOWNLOADS}=/some/folder")
    logging.set_verbosity_error()  # otherwise it reports every retry
    folder = Path(root) / "_".join([*name.split("/"), *([revision.replace("/", "_")] if revision else [])])
    paths: dict[str, Path] = {}
    for file in (weights,) if weights else (PLAN, WEIGHTS):
        try:
            paths[file] = Path(hf_hub_download(name, file, revision=revision, local_dir=folder))
        except Exception as error:  # no network, no such repository, no such file, not allowed; some kinds are httpx's
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(
                f"{file} of {name} could not be downloaded from Hugging Face ({reason}). Give a local file, or check "
                f"the name and the network"
            ) from error
    return paths[weights or WEIGHTS], read_json(paths[PLAN], most=LARGEST_JSON) if PLAN in paths else {}
