"""Read foreign files without ever executing a pickle."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnssl_ext import checkpoint
from nnssl_ext.configurations import intensities_of
from nnssl_ext.errors import RefusedError, UserError
from nnssl_ext.foreign import load_tensors
from nnssl_ext.networks.architectures import pct_net, vit
from nnssl_ext.transfer import names, resnet
from nnssl_ext.transfer.heads import output_names
from nnssl_ext.transfer.locate import NOTE, locate
from nnssl_ext.transfer.source import PUBLISHED_PCT_NET, PretrainedWeights, geometry, planned_geometry

#: Recognizes a kind of file and reads it: content, file and plan -> weights, or None for another kind.
Reader = Callable[[dict[str, Any], Path, dict[str, Any]], "PretrainedWeights | None"]
#: Where frameworks keep a state dict.
PLACES = ("network_weights", "state_dict", "model_state_dict", "teacher", "model", "network", "net", "module")
#: What files begin with that are not what was asked for, and what to do.
FOREIGN_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer. Fetch the file itself with git lfs pull",
    b"<!doctype": "a web page. Download the file itself",
    b"<html": "a web page. Download the file itself",
    b"\x1f\x8b": "a gzip archive. Unpack it and give the file inside",
    b"\x89hdf": "an HDF5 file. Export the weights to PyTorch first",
}
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "mask_token")


def read_source(text: str) -> PretrainedWeights:
    """Read pretrained weights from any source.

    Raises:
        UserError: If there is nothing, it needs more than tensors and plain values, or its kind is not known.
    """
    path, plan = locate(text)
    content = _content(path)
    for reader in READERS:
        source = reader(content, path, plan)
        if source is not None:
            record = content.get("init_args")
            kept = {**record, "trainer_name": content.get("trainer_name")} if isinstance(record, dict) else {}
            return replace(source, recorded=kept)
    raise UserError(
        f"{path} is of no known kind. Expected a checkpoint of nnssl_ext, nnU-Net or nnssl, or a state dict "
        f"(bare, or under {', '.join(PLACES[:5])}), got {_listed(content)}. Save network.state_dict() with torch.save"
    )


def _content(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                content = {"network_weights": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
                noted = (file.metadata() or {}).get(NOTE)
            return content if noted is None else {**content, NOTE: json.loads(noted)}
        content = load_tensors(path)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # damaged and hostile files raise anything
        raise UserError(f"{path} is refused: {_why(error, path)}. Nothing of it was executed") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected named tensors")
    return content


def _why(error: Exception, path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    for known, meaning in FOREIGN_STARTS.items():
        if start.startswith(known):
            return f"it is {meaning}"
    if isinstance(error, RefusedError):
        return str(error)
    advice = "more than tensors and plain values. Save network.state_dict() with torch.save where it was made"
    needed = re.search(r"GLOBAL (\S+)", str(error))
    if needed:
        return f"it needs {needed[1]!r}, {advice}"
    if isinstance(error, pickle.UnpicklingError):
        return f"it needs {advice}, or is damaged"
    if start.startswith(b"pk\x03\x04") and "central directory" not in str(error):
        return "it is a zip archive without a state dict. Unpack it and give the file inside"
    return f"it is damaged or no file of tensors ({type(error).__name__})"


def _own(content: dict[str, Any], path: Path, plan: dict[str, Any]) -> PretrainedWeights | None:
    own = content.get("nnssl_ext")
    if not isinstance(own, dict) or not _is_state_dict(content.get("network_weights")):
        return None
    checkpoint.verify(content, path)
    read = _renamed(content["network_weights"])
    read["untrained"] = _untrained(read["weights"], own.get("trained"))
    read["citations"] = content.get("citations") or []
    read["position_grid"] = _grid(own)
    plan = content.get("nnssl_adaptation_plan") or plan
    if plan:
        read["geometry"] = planned_geometry(plan, read["weights"])
    else:  # a fine-tuned network has nnU-Net's own record of its plans instead
        read |= _recorded(content, path, read)
    kind = f"nnssl_ext, {own.get('title') or content.get('trainer_name', 'unknown origin')}"
    return PretrainedWeights(path, kind, **read)


def _untrained(weights: Mapping[str, Tensor], trained: Any) -> frozenset[str]:
    """List tensors that pretraining left untrained."""
    if not isinstance(trained, list):
        return frozenset()
    seen = {names.canonical_name(name) for name in trained if isinstance(name, str)}
    return frozenset(name for name in weights if name not in seen and not name.endswith(_BUFFERS))


def _grid(own: Mapping[str, Any]) -> tuple[int, ...]:
    grid = own.get("position_grid")
    return tuple(grid) if isinstance(grid, list) and all(isinstance(edge, int) for edge in grid) else ()


def _own_safetensors(content: dict[str, Any], path: Path, plan: dict[str, Any]) -> PretrainedWeights | None:
    """Read our exported safetensors and the plan beside it."""
    own, raw = content.get(NOTE), content.get("network_weights")
    if not isinstance(own, dict) or not _is_state_dict(raw):
        return None
    read = _renamed(raw)
    if checkpoint.digest(read["weights"]) != own.get("weights_sha256"):
        raise UserError(f"{path} is damaged: its content does not match its sha256. Copy or export it again")
    read["untrained"] = _untrained(read["weights"], own.get("trained"))
    read["position_grid"] = _grid(own)
    read["geometry"], read["citations"] = planned_geometry(plan, read["weights"]), plan.get("citations") or []
    return PretrainedWeights(path, f"nnssl_ext, {own.get('title') or 'unknown origin'}", **read)


def _nnssl(content: dict[str, Any], path: Path, plan: dict[str, Any]) -> PretrainedWeights | None:
    plan = content.get("nnssl_adaptation_plan") or plan
    raw = content.get("network_weights")
    if not isinstance(plan, dict) or "architecture_plans" not in plan or not _is_state_dict(raw):
        return None
    transformer = any(names.canonical_name(name).endswith("pos_embed") for name in raw)
    usual = ("eva", "down_projection") if transformer else ("encoder.stages", "encoder.stem")
    places = {
        _bare_name(place): usual_place
        for key, usual_place in zip(("key_to_encoder", "key_to_stem"), usual, strict=True)
        if isinstance(place := plan.get(key), str) and place
    }

    def at_usual_place(name: str) -> str:
        bare = _bare_name(name)
        for place, usual_place in places.items():
            # a plain U-Net's stem lies inside its encoder and moves with it
            if bare.startswith(f"{place}."):
                return usual_place + bare.removeprefix(place)
        return name

    read = _renamed(raw, at_usual_place)
    architecture = plan["architecture_plans"]
    name = architecture.get("arch_class_name") if isinstance(architecture, dict) else None
    read["geometry"] = planned_geometry(plan, read["weights"])
    read["citations"] = content.get("citations") or plan.get("citations") or []
    return PretrainedWeights(path, f"nnssl adaptation plan, {name or 'unknown architecture'}", **read)


def _bare_name(name: str) -> str:
    return re.sub(r"^(?:module\.|_orig_mod\.)+", "", name)


def _stock(content: dict[str, Any], path: Path, plan: dict[str, Any]) -> PretrainedWeights | None:
    raw = content.get("network_weights")
    if not _is_state_dict(raw) or not isinstance(content.get("init_args"), dict):
        return None
    read = _renamed(raw)
    read |= _recorded(content, path, read)
    return PretrainedWeights(path, f"nnU-Net, {content.get('trainer_name', 'unknown trainer')}", **read)


def _recorded(content: dict[str, Any], path: Path, read: Mapping[str, Any]) -> dict[str, Any]:
    """Read geometry and outputs from a checkpoint's plans."""
    arguments = content.get("init_args") or {}
    result: dict[str, Any] = {}
    try:
        dataset = arguments.get("dataset_json") or {}
        plans = PlansManager(arguments["plans"])
        configuration = plans.get_configuration(arguments["configuration"])
        result["geometry"] = geometry(
            configuration.configuration,
            configuration.network_arch_init_kwargs.get("strides"),
            read["weights"],
            channel_names=dataset.get("channel_names") or dataset.get("modality"),
            intensities=intensities_of(plans.plans),
        )
        if "labels" in dataset:
            result["outputs"], result["regions"] = output_names(dataset)
    except Exception as error:  # plans of any age and origin
        result.setdefault("geometry", geometry({}, None, read["weights"]))
        result["notes"] = (*read["notes"], f"The plans in {path.name} could not be read ({error!r}).")
    return result


def _state_dict(content: dict[str, Any]) -> dict[str, Tensor] | None:
    """Find a state dict, up to three levels deep."""
    for _ in range(3):
        if _is_state_dict(content):
            return content
        below = [content[place] for place in PLACES if isinstance(content.get(place), dict)]
        content = next((value for value in below if _is_state_dict(value)), below[0] if below else {})
    return content if _is_state_dict(content) else None


def _bare(content: dict[str, Any], path: Path, plan: dict[str, Any]) -> PretrainedWeights | None:
    raw = _state_dict(content)
    if raw is None:
        return None
    family = names.family_of(names.without_wrappers(raw))
    if family == names.RESNET:
        return PretrainedWeights(path, "ResNet3D", **_renamed(raw, resnet.renamed, (resnet.NOTE,)))
    if family == names.PCT_NET:
        return _pct_net(raw, path)
    if family == names.VIT and not any(".decoder." in f".{name}" for name in raw):
        return _vision_transformer(raw, path)
    read = _renamed(raw)
    return PretrainedWeights(path, "bare state dict", geometry=planned_geometry(plan, read["weights"]), **read)


def _pct_net(raw: Mapping[str, Tensor], path: Path) -> PretrainedWeights:
    """Read MIS-FM's file. Its norms have counted batches in the resolution modes that were trained."""
    read = _renamed(raw, pct_net.published_name)
    trained = pct_net.trained_modes(read["weights"])
    if trained:
        modes = [mode for mode in range(len(pct_net.FLAT)) if mode not in trained]
        places = tuple(f"{place}.{mode}." for place in ("embeddings", "pred_heads") for mode in modes)
        read["untrained"] = frozenset(name for name in read["weights"] if name.startswith(places))
        read["notes"] += (
            f"Of the file's {len(pct_net.FLAT)} resolution modes, {', '.join(map(str, trained))} was trained.",
        )
    return PretrainedWeights(path, PUBLISHED_PCT_NET, **read)


def _vision_transformer(raw: Mapping[str, Tensor], path: Path) -> PretrainedWeights:
    """Read 3DINO's or MONAI's encoder without the objective's heads."""
    inside = any(_bare_name(name).startswith("backbone.") for name in raw)
    encoder = {name: tensor for name, tensor in raw.items() if not inside or "backbone." in name}
    note = "The source is an encoder: the decoder stays at its initial values."
    read = _renamed(encoder, lambda name: vit.published_name(names.from_monai(name)), (note,))
    if not any(names.from_monai(name) != name for name in encoder):
        return PretrainedWeights(path, "3DINO's vision transformer", **read)
    table = read["weights"].get("backbone.pos_embed")
    if table is not None and table.ndim == 3:
        # MONAI adds positions to the patches alone: its CLS token has none
        read["weights"]["backbone.pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], 1)
    return PretrainedWeights(path, "MONAI's vision transformer", **read)


def _renamed(
    raw: Mapping[str, Tensor], rename: Callable[[str], str] = str, notes: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Reduce a state dict to canonical names.

    The file's own names of what was renamed are kept.

    Args:
        raw: The state dict of a file.
        rename: From the file's names without wrappers to our networks' names.
        notes: Remarks that belong to the kind of file.
    """
    plain = names.without_wrappers(raw)
    renamed = {rename(name): tensor for name, tensor in plain.items()}
    differing = names.differing_aliases(renamed)
    if differing:
        notes += (
            f"{len(differing)} tensors have several names with different values, as {differing[0]}. The last name was "
            f"taken, as torch does.",
        )
    original = {names.canonical_name(rename(name)): name for name in plain if rename(name) != name}
    return {"weights": names.canonical_weights(renamed), "names": original, "notes": notes}


READERS: tuple[Reader, ...] = (_own, _own_safetensors, _nnssl, _stock, _bare)


def _is_state_dict(content: Any) -> TypeGuard[dict[str, Tensor]]:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )


def _listed(content: dict[str, Any]) -> str:
    keys = [repr(key) for key in content]
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "") if keys else "nothing"
