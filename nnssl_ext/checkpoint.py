"""Write and read checkpoints without pickles.

Stock keys as nnU-Net reads them, ``nnssl_adaptation_plan`` as nnU-Net's master and nnssl read it, and our own under
``nnssl_ext``. Every file opens with ``torch.load(file, weights_only=True)``: no pickle is ever executed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_ext import __version__
from nnssl_ext.errors import UserError
from nnssl_ext.files import replaced_on_success
from nnssl_ext.foreign import load_tensors

#: Version of the content under ``nnssl_ext``. 1 had no ``content_sha256``, 2 the setting names of version 0.1.
FORMAT = 3


def plain(value: Any, memory: dict[Any, Tensor] | None = None, copy: bool = False) -> Any:
    """Convert values to plain Python and CPU tensors.

    Tensors that share memory share it afterwards: a U-Net's state dict names most tensors up to four times.

    Args:
        value: Content of a checkpoint.
        memory: Tensors that were converted already.
        copy: Copy tensors that are on the CPU already, so that later changes do not show.
    """
    memory = {} if memory is None else memory
    if isinstance(value, Tensor):
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.device)
        if value.numel() == 0 or key not in memory:
            memory[key] = value.detach().to("cpu", copy=copy, memory_format=torch.contiguous_format)
        return memory[key]
    if isinstance(value, Mapping):
        return {plain(k, memory, copy): plain(v, memory, copy) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return (
            [plain(v, memory, copy) for v in value]
            if type(value) is not tuple
            else tuple(plain(v, memory, copy) for v in value)
        )
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value


def digest(weights: Mapping[str, Tensor]) -> str:
    """Compute the sha256 of a state dict. It covers names, shapes, types and bytes, in the order of the names."""
    result = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        result.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return result.hexdigest()


def content_digest(content: Mapping[str, Any]) -> str:
    """Compute the sha256 of a checkpoint's content. Its own entry is left out. Tensors that share memory count once."""
    result, memory = hashlib.sha256(), dict[Any, str]()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            if value.numel() == 0 or key not in memory:
                memory[key] = digest({"": value})
            result.update(memory[key].encode())
        elif isinstance(value, dict):
            result.update(f"dict {len(value)}\n".encode())
            for name, item in value.items():
                result.update(f"{name!r}\n".encode())
                feed(item)
        elif isinstance(value, (list, tuple)):
            result.update(f"{type(value).__name__} {len(value)}\n".encode())
            for item in value:
                feed(item)
        else:
            result.update(f"{value!r}\n".encode())

    own = {key: value for key, value in content["nnssl_ext"].items() if key != "content_sha256"}
    feed({**content, "nnssl_ext": own})
    return result.hexdigest()


def save(content: Mapping[str, Any], path: Path, before: Callable[[Path], None] | None = None) -> None:
    """Write a checkpoint atomically.

    The old file is replaced only after the new one has been read back.

    Args:
        content: With ``network_weights`` and ``nnssl_ext``, to which the sha256 of the weights and of all are added.
        path: The file.
        before: Called with ``path`` when the new file is complete and the old one still in place.

    Raises:
        UserError: If it cannot be written. The old file is then intact.
    """
    content = plain(content)
    content["nnssl_ext"]["weights_sha256"] = digest(content["network_weights"])
    content["nnssl_ext"]["content_sha256"] = content_digest(content)
    try:
        with replaced_on_success(path) as temporary:
            torch.save(content, temporary)
            load(temporary)
            if before is not None:
                before(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(
            f"checkpoint {path} could not be written ({error}). The old file is untouched. "
            f"Free some space or give write permission, then try again (a training goes on with --c)"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint and check its sha256.

    Raises:
        UserError: If it is missing, damaged, from elsewhere or from a later version.
    """
    try:
        content = load_tensors(path, [])
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # damaged archives raise OSError, RuntimeError, EOFError, UnpicklingError, ...
        raise UserError(
            f"checkpoint {path} is damaged or no pretraining checkpoint ({type(error).__name__}). "
            f"Delete it to go on from an earlier one"
        ) from error
    verify(content, path)
    return content


def verify(content: Any, path: Path) -> None:
    """Check that content is an undamaged checkpoint.

    Raises:
        UserError: If it is not.
    """
    own = content.get("nnssl_ext") if isinstance(content, dict) else None
    if not isinstance(own, dict) or not isinstance(content.get("network_weights"), dict):
        raise UserError(f"{path} is no pretraining checkpoint of nnssl_ext. Give a checkpoint_final.pth of one")
    if own.get("format") not in range(1, FORMAT + 1):
        raise UserError(f"{path} has format {own.get('format')!r}, this nnssl_ext reads {FORMAT}. Use its own version")
    try:
        whole = digest(content["network_weights"]) == own.get("weights_sha256")
        if whole and own["format"] > 1:
            whole = content_digest(content) == own["content_sha256"]
    except Exception:  # what is no state dict raises anything
        whole = False
    if not whole:
        raise UserError(
            f"checkpoint {path} is damaged: its content does not match its sha256. Restore it, or "
            f"delete it to go on from an earlier one"
        )


def refuse_older(content: Mapping[str, Any], source: str) -> None:
    """Refuse to continue a run of an earlier version.

    Raises:
        UserError: With the version that continues it.
    """
    own = content["nnssl_ext"]
    if own["format"] < FORMAT:
        version = own.get("versions", {}).get("nnssl_ext", "0.1.0")
        raise UserError(
            f"{source} was begun with nnssl_ext {version}, this is {__version__}. Continue it with nnssl_ext "
            f"{version}, or start a new run without --c. Its weights can still be fine-tuned, transferred and exported"
        )
