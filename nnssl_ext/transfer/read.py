"""Reads other people's files: tensors and plain values only; a pickle is never executed."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnssl_ext import checkpoint
from nnssl_ext.errors import RefusedError, UserError
from nnssl_ext.foreign import load_tensors
from nnssl_ext.networks.architectures import pct_net, vit
from nnssl_ext.transfer import resnet
from nnssl_ext.transfer.geometry import geometry, planned_geometry
from nnssl_ext.transfer.locate import NOTE, Located, locate
from nnssl_ext.transfer.names import canonical_name, canonical_weights
from nnssl_ext.transfer.source import Geometry, Source

#: What recognises a kind of file and reads it: content, file and plan -> Source, or None for another kind.
Reader = Callable[[dict[str, Any], Path, dict[str, Any]], "Source | None"]


def read_source(text: str) -> Source:
    """Pretrained weights from a file, a folder or a Hugging Face repository.

    Raises:
        UserError: If there is nothing, it needs more than tensors and plain values, or its kind is not known.
    """
    located = locate(text)
    content = _content(located)
    for reader in READERS:
        source = reader(content, located.weights, located.plan)
        if source is not None:
            return source
    raise UserError(
        f"{located.weights} is of no known kind: it holds {_listed(content)}; known are checkpoints of nnssl_ext, "
        f"nnU-Net and nnssl, a ResNet3D-18 under 'state_dict', a PCT-Net under 'model_state_dict' and a 3DINO vision "
        f"transformer under 'teacher'"
    )


def _content(located: Located) -> dict[str, Any]:
    path = located.weights
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
        raise UserError(f"{path} is refused: {_why(error)}; nothing of it was executed") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected named tensors")
    return content


def _why(error: Exception) -> str:
    needed = re.search(r"GLOBAL (\S+)", str(error))
    if needed:
        return f"it needs '{needed[1]}', more than tensors and plain values (save the bare state dict anew)"
    if isinstance(error, RefusedError):
        return str(error)
    if isinstance(error, pickle.UnpicklingError):
        return "it needs more than tensors and plain values (save the bare state dict anew), or is damaged"
    return f"it is damaged or no file of tensors ({type(error).__name__})"


def _own(content: dict[str, Any], path: Path, plan: dict[str, Any]) -> Source | None:
    own = content.get("nnssl_ext")
    if not isinstance(own, dict) or not _tensors(content.get("network_weights")):
        return None
    raw = content["network_weights"]
    checkpoint.verify(content, path)
    weights = canonical_weights(raw, str(path))
    untrained = _untrained(weights, own.get("trained"))
    plan = content.get("nnssl_adaptation_plan") or plan
    # a fine-tuned network has nnU-Net's own record of its plans instead
    found, note = (planned_geometry(plan, weights), "") if plan else _recorded_geometry(content, path, weights)
    kind = f"nnssl_ext, {own.get('title') or content.get('trainer_name', 'unknown origin')}"
    return Source(path, kind, weights, found, untrained, content.get("citations") or [], note)


def _untrained(weights: Mapping[str, Tensor], trained: Any) -> frozenset[str]:
    """The tensors that a pretraining left at their initial values, as it noted which it trained."""
    if not isinstance(trained, list):
        return frozenset()
    seen = {canonical_name(name) for name in trained if isinstance(name, str)}
    return frozenset(name for name in weights if name not in seen and not name.endswith(_BUFFERS))


def _own_safetensors(content: dict[str, Any], path: Path, plan: dict[str, Any]) -> Source | None:
    """What ``nnssl_ext export --safetensors`` wrote; the rest of what is known stands in the plan beside it."""
    own, raw = content.get(NOTE), content.get("network_weights")
    if not isinstance(own, dict) or not _tensors(raw):
        return None
    weights = canonical_weights(raw, str(path))
    if checkpoint.digest(weights) != own.get("weights_sha256"):
        raise UserError(f"{path} is damaged: what it holds does not match its sha256")
    untrained = _untrained(weights, own.get("trained"))
    kind = f"nnssl_ext, {own.get('title') or 'unknown origin'}"
    return Source(path, kind, weights, planned_geometry(plan, weights), untrained, plan.get("citations") or [])


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "mask_token")


def _nnssl(content: dict[str, Any], path: Path, plan: dict[str, Any]) -> Source | None:
    plan = content.get("nnssl_adaptation_plan") or plan
    raw = content.get("network_weights")
    if not isinstance(plan, dict) or "architecture_plans" not in plan or not _tensors(raw):
        return None
    weights = canonical_weights(_at_usual_place(raw, plan), str(path))
    name = (plan.get("architecture_plans") or {}).get("arch_class_name", "unknown architecture")
    return Source(
        path,
        f"nnssl adaptation plan, {name}",
        weights,
        planned_geometry(plan, weights),
        citations=content.get("citations") or plan.get("citations") or [],
    )


def _at_usual_place(raw: Mapping[str, Tensor], plan: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encoder and stem under the names that nnU-Net's own networks have; the plan says where they are."""
    transformer = any(canonical_name(name).endswith("pos_embed") for name in raw)
    usual = ("eva", "down_projection") if transformer else ("encoder.stages", "encoder.stem")
    places = [(plan.get(key), place) for key, place in zip(("key_to_encoder", "key_to_stem"), usual, strict=True)]
    result = {}
    for name, tensor in raw.items():
        for place, usual_place in places:
            # a plain U-Net's stem lies inside its encoder and moves with it
            if isinstance(place, str) and place and name.startswith(f"{place}."):
                name = usual_place + name.removeprefix(place)
                break
        result[name] = tensor
    return result


def _stock(content: dict[str, Any], path: Path, plan: dict[str, Any]) -> Source | None:
    raw, arguments = content.get("network_weights"), content.get("init_args")
    if not _tensors(raw) or not isinstance(arguments, dict):
        return None
    weights = canonical_weights(raw, str(path))
    found, note = _recorded_geometry(content, path, weights)
    return Source(path, f"nnU-Net, {content.get('trainer_name', 'unknown trainer')}", weights, found, note=note)


def _recorded_geometry(content: dict[str, Any], path: Path, weights: dict[str, Tensor]) -> tuple[Geometry, str]:
    """The geometry in the plans that nnU-Net keeps in its checkpoints, and a remark if they cannot be read."""
    try:
        arguments = content["init_args"]
        configuration = PlansManager(arguments["plans"]).get_configuration(arguments["configuration"])
        strides = configuration.network_arch_init_kwargs.get("strides")
        return geometry(configuration.spacing, strides, configuration.patch_size, weights), ""
    except Exception as error:  # plans of any age and origin
        return geometry(None, None, None, weights), f"The plans in {path.name} could not be read ({error!r})."


def _bare(content: dict[str, Any], path: Path, plan: dict[str, Any]) -> Source | None:
    raw = content.get("network_weights")
    if not _tensors(raw):
        return None
    weights = canonical_weights(raw, str(path))
    return Source(path, "bare state dict", weights, planned_geometry(plan, weights))


def _resnet(content: dict[str, Any], path: Path, plan: dict[str, Any]) -> Source | None:
    raw = content.get("state_dict", content)
    if not _tensors(raw) or not resnet.is_resnet(raw):
        return None
    note = "A ResNet's layers were taken as the stages of the same number; its weights do not depend on the stride."
    return Source(path, "ResNet3D", resnet.as_residual_encoder(raw), note=note)


def _pct_net(content: dict[str, Any], path: Path, plan: dict[str, Any]) -> Source | None:
    raw = content.get("model_state_dict")
    if not _tensors(raw) or not any(canonical_name(name).startswith("pyramid_ct.") for name in raw):
        return None
    weights = pct_net.from_published(canonical_weights(raw, str(path)))
    return Source(path, "MIS-FM's PCT-Net", weights)


def _vision_transformer(content: dict[str, Any], path: Path, plan: dict[str, Any]) -> Source | None:
    raw = content.get("teacher")
    if not _tensors(raw) or not any(canonical_name(name).startswith("backbone.blocks.") for name in raw):
        return None
    encoder = vit.from_published(canonical_weights(raw, str(path)))
    weights = {f"backbone.{name}": tensor for name, tensor in encoder.items()}
    note = "The source is an encoder: the decoder stays at its initial values."
    return Source(path, "3DINO's vision transformer", weights, note=note)


READERS: tuple[Reader, ...] = (_own, _own_safetensors, _nnssl, _stock, _bare, _resnet, _pct_net, _vision_transformer)


def _tensors(content: Any) -> TypeGuard[dict[str, Tensor]]:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )


def _listed(content: dict[str, Any]) -> str:
    names = [repr(key) for key in content]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
