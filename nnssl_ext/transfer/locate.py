"""Where pretrained weights lie: a file, a folder, or a repository of Hugging Face."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json

WEIGHTS, PLAN, CONFIG, SAFETENSORS = "checkpoint_final.pth", "adaptation_plan.json", "config.json", "model.safetensors"
#: The entry of our safetensors files' metadata.
NOTE = "nnssl_ext_export"
#: nnssl's and nnU-Net's own variable: the folder that downloads go to.
DOWNLOADS = "nnssl_pretrained_models"
#: An adaptation plan is a few kilobytes; what is much larger is something else.
LARGEST_JSON = 4 * 2**20
#: Endings of files with weights; such a name is no repository's.
FILES = (".pth", ".pt", ".ckpt", ".tar", ".safetensors")

_REPOSITORY = re.compile(r"(?:https://huggingface\.co/)?(?P<name>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?/?$")


@dataclass(frozen=True)
class Located:
    """A file with weights, and the adaptation plan that lies beside it ({} if none does)."""

    weights: Path
    plan: dict[str, Any]


def locate(text: str) -> Located:
    """Find the weights that ``text`` names, downloading them if it is a Hugging Face repository.

    Args:
        text: A file; a folder with checkpoint_final.pth or model.safetensors; ``owner/name``, ``owner/name@revision``
            or the repository's address.

    Raises:
        UserError: If there is nothing, or it cannot be downloaded.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        found = [path / name for name in (WEIGHTS, SAFETENSORS) if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} holds neither {WEIGHTS} nor {SAFETENSORS}; name the file")
        return Located(found[0], _plan_beside(found[0]))
    if path.is_file():
        return Located(path, _plan_beside(path))
    repository = _REPOSITORY.match(text)
    if repository is None or path.suffix in FILES:
        raise UserError(f"{text} is no file, no folder and no Hugging Face repository (owner/name)")
    return _download(repository["name"], repository["revision"])


def read_limited_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file from elsewhere.

    Raises:
        UserError: If it is larger than ``LARGEST_JSON``, no JSON or no object.
    """
    if path.stat().st_size > LARGEST_JSON:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, more than any adaptation plan: refused")
    return read_json(path)


def _plan_beside(weights: Path) -> dict[str, Any]:
    plan = weights.parent / PLAN
    return read_limited_json(plan) if plan.is_file() else {}


def _download(name: str, revision: str | None) -> Located:
    from huggingface_hub import hf_hub_download

    root = os.environ.get(DOWNLOADS)
    if not root:
        raise UserError(f"{name} is no file here; to download it from Hugging Face, export {DOWNLOADS}=/some/folder")
    folder = Path(root) / "_".join([*name.split("/"), *([revision.replace("/", "_")] if revision else [])])
    paths = {}
    for file in (PLAN, WEIGHTS):
        try:
            paths[file] = Path(hf_hub_download(name, file, revision=revision, local_dir=folder))
        except (OSError, ValueError) as error:  # no network, no such repository, no such file, not allowed
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(
                f"{file} of {name} could not be downloaded from Hugging Face ({reason}); "
                f"give a local file instead, or look at the name and the network"
            ) from error
    return Located(paths[WEIGHTS], read_limited_json(paths[PLAN]))
