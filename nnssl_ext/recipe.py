"""Merge recipes into a data set's own plans.

A recipe has up to four parts::

    {"description": "one line",
     "nnssl_ext":     settings of pretraining and fine-tuning: common ones, and one section per method
     "configuration": batch_size, patch_size and patch_limit of the 3-D configurations, for fine-tuning too
     "architecture":  width of the network (features_base, features_max), or another network (network_class_name,
                      arch_kwargs, _kw_requires_import)}
"""

from __future__ import annotations

import json
import pydoc
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl_ext.configurations import configuration_of, total_stride
from nnssl_ext.errors import RefusedError, UserError
from nnssl_ext.files import replaced_on_success
from nnssl_ext.resources import resource_folder
from nnssl_ext.settings import PLANS_KEY, check_settings, setting, unknown_name

#: Largest JSON file that is read, and how deeply a file from elsewhere may be nested.
MAX_JSON_BYTES, MAX_DEPTH = 64 * 2**20, 64


@dataclass(frozen=True)
class ConfigurationOverlay:
    """Changes of a plan's 3-D configurations."""

    batch_size: int | None = setting(None, "Batch size of the configuration.", low=1)
    patch_size: list[int] | None = setting(None, "Patch edges in voxels.", low=1, length=3)
    patch_limit: int | None = setting(
        None, "Longest patch edge. Edges are reduced to sizes that the network takes.", low=1
    )


@dataclass(frozen=True)
class ArchitectureOverlay:
    """Changes of a plan's network."""

    features_base: int | None = setting(None, "Channels of the first stage. They double with each stage.", low=1)
    features_max: int | None = setting(None, "Upper limit of the channels of a stage.", low=1)
    network_class_name: str | None = setting(None, "Dotted path of another network, which replaces the plan's.")
    arch_kwargs: dict | None = setting(
        None, "Arguments of the network, merged into its own. Missing strides follow from the spacing."
    )
    _kw_requires_import: list[str] | None = setting(None, "Arguments that are dotted paths to import.")


@dataclass
class Recipe:
    """A recipe as plain JSON values."""

    name: str
    settings: dict = field(default_factory=dict)
    configuration: dict = field(default_factory=dict)
    architecture: dict = field(default_factory=dict)

    def parts(self) -> dict[str, dict]:
        """Return the parts by their names in the file."""
        return {
            PLANS_KEY: self.settings,
            "configuration": self.configuration,
            "architecture": self.architecture,
        }


def available_recipes() -> list[str]:
    """List the recipes that come with the package."""
    return sorted(path.stem for path in resource_folder("plans").glob("*.json"))


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe by name or path.

    Raises:
        UserError: If it does not exist, is no JSON, or has an unknown part.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        if name_or_path not in available_recipes():
            raise UserError(unknown_name("recipe", name_or_path, available_recipes(), "nnssl_ext plan"))
        path = resource_folder("plans") / f"{name_or_path}.json"
    content = read_json(path)
    parts = {"description", PLANS_KEY, "configuration", "architecture"}
    for key in content:
        if key not in parts:
            raise UserError(unknown_name("part", key, sorted(parts), str(path)))
    return Recipe(
        str(path),
        content.get(PLANS_KEY, {}),
        content.get("configuration", {}),
        content.get("architecture", {}),
    )


def assignments_recipe(assignments: Iterable[str]) -> Recipe:
    """Build a recipe from words like ``epochs=200``.

    Values are JSON, or strings if they are no JSON. Names that begin with ``configuration.`` and ``architecture.``
    belong to these parts. ``nnssl_ext.epochs`` is ``epochs``, as messages write it.

    Raises:
        UserError: If a name is a setting and a section at once.
    """
    recipe = Recipe("command line")
    for word in assignments:
        name, _, text = word.partition("=")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        keys = name.split(".")
        target = recipe.settings
        if keys[0] == PLANS_KEY and len(keys) > 1:
            del keys[0]
        if keys[0] in ("configuration", "architecture"):
            target = recipe.parts()[keys.pop(0)]
        if not keys:
            raise UserError(f"command line: expected {name}.SETTING=VALUE, got '{word}'. Name a setting of this part")
        for key in keys[:-1]:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise UserError(f"command line: '{name}' is a setting and a section at once")
        target[keys[-1]] = value
    return recipe


def recipes_of(words: Iterable[str]) -> list[Recipe]:
    """Read recipes and settings of a command line."""
    return [assignments_recipe([word]) if "=" in word else load_recipe(word) for word in words]


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``above`` into a copy of ``below``."""
    result = deepcopy(dict(below))
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merged(result[key], value)
        else:
            result[key] = deepcopy(value)
    return result


def derive_plans(plans: Mapping[str, Any], name: str, recipes: list[Recipe], configurations: list[str]) -> dict:
    """Merge recipes into plans, in their order.

    ``data_identifier`` stays, so that the preprocessed data is shared. Changed configurations are resolved first:
    inherited values are filled in, old formats converted.

    Args:
        plans: The data set's own plans.
        name: ``plans_name`` of the result, equal to its file's stem.
        recipes: The recipes.
        configurations: Names of the configurations to change.

    Raises:
        UserError: For unknown or ill-typed values, and for networks that cannot be built so.
    """
    resolved = {name: configuration_of(plans, name) for name in configurations}
    # unlike deepcopy, configurations share no objects afterwards
    result = json.loads(json.dumps({**plans, "configurations": {**plans["configurations"], **resolved}}))
    result["plans_name"] = name
    for recipe in recipes:
        result[PLANS_KEY] = merged(result.get(PLANS_KEY, {}), recipe.settings)
        configuration = check_settings(ConfigurationOverlay, recipe.configuration, recipe.name, "configuration.")
        architecture = check_settings(ArchitectureOverlay, recipe.architecture, recipe.name, "architecture.")
        for configuration_name in configurations:
            _apply(result["configurations"][configuration_name], configuration, architecture, recipe.name)
    return result


def _apply(target: dict, configuration: ConfigurationOverlay, architecture: ArchitectureOverlay, where: str) -> None:
    replaced = _apply_architecture(target, architecture, where)
    if configuration.batch_size is not None:
        target["batch_size"] = configuration.batch_size
    if configuration.patch_size is not None:
        target["patch_size"] = list(configuration.patch_size)
    elif replaced or configuration.patch_limit is not None:
        target["patch_size"] = legal_patch(target, configuration.patch_limit)


def legal_patch(configuration: Mapping[str, Any], limit: int | None) -> list[int]:
    """Round a patch to whole strides within a limit. Two voxels at the bottleneck suit every network."""
    edges = []
    for edge, stride in zip(configuration["patch_size"], total_stride(configuration), strict=True):
        steps = (edge + stride // 2) // stride
        if limit is not None:
            steps = min(steps, limit // stride)
        edges.append(max(steps, 2 if stride > 1 else 1) * stride)
    return edges


def _apply_architecture(target: dict, overlay: ArchitectureOverlay, where: str) -> bool:
    """Change a network. Return whether its class changed."""
    plan = target["architecture"]
    replaced = overlay.network_class_name not in (None, plan["network_class_name"])
    if replaced:
        target["architecture"] = plan = {
            "network_class_name": overlay.network_class_name,
            "arch_kwargs": default_kwargs(str(overlay.network_class_name), target["spacing"], where),
            "_kw_requires_import": [],
        }
    kwargs = plan["arch_kwargs"] = merged(plan["arch_kwargs"], overlay.arch_kwargs or {})
    if "strides" not in kwargs:
        raise UserError(f"{where}: architecture.arch_kwargs needs 'strides': stock nnU-Net reads them from the plans")
    if overlay._kw_requires_import is not None:
        plan["_kw_requires_import"] = list(overlay._kw_requires_import)
    if overlay.features_base is not None or overlay.features_max is not None:
        if "features_per_stage" not in kwargs:
            name = plan["network_class_name"].rsplit(".", 1)[-1]
            raise UserError(
                f"{where}: architecture.features_base and features_max are for networks with features_per_stage, "
                f"{name} has none. Set architecture.arch_kwargs instead"
            )
        base = overlay.features_base or kwargs["features_per_stage"][0]
        limit = overlay.features_max or max(kwargs["features_per_stage"])
        stages = len(kwargs["features_per_stage"])
        kwargs["features_per_stage"] = [min(base * 2**stage, limit) for stage in range(stages)]
    return replaced


def default_kwargs(network_class_name: str, spacing: list[float], where: str) -> dict[str, Any]:
    """Return a network's strides for a spacing, if known.

    Args:
        network_class_name: Dotted path.
        spacing: Voxel edges in mm.
        where: Source of the name, for messages.

    Raises:
        UserError: If nothing can be imported under that name.
    """
    try:
        network_class: Any = pydoc.locate(network_class_name)
    except pydoc.ErrorDuringImport as error:
        network_class, reason = None, f" ({error})"
    else:
        reason = ""
    if network_class is None:
        raise UserError(f"{where}: architecture.network_class_name '{network_class_name}' cannot be imported{reason}")
    return {"strides": network_class.strides_for(spacing)} if hasattr(network_class, "strides_for") else {}


def read_json(path: Path, kind: type = dict, most: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file, with or without byte-order mark.

    Args:
        path: The file.
        kind: Expected type of the content, dict or list.
        most: Bytes that are accepted.

    Raises:
        UserError: If it cannot be read, is too large or too deep, or has another type.
    """
    try:
        if (size := path.stat().st_size) > most:
            raise UserError(f"{path} has {size:,} bytes, more than any settings: refused (at most {most:,})")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        check_json(content)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except RefusedError as error:
        raise UserError(f"{path} is refused: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON in UTF-8: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path} is refused: it is nested too deeply") from error
    if not isinstance(content, kind):
        raise UserError(f"{path} must hold a JSON {kind.__name__}, got {type(content).__name__}")
    return content


def check_json(content: Any) -> None:
    """Refuse content that is nested too deeply.

    Raises:
        RefusedError: Beyond ``MAX_DEPTH`` levels.
    """
    for _ in nested(content, f"it is nested more than {MAX_DEPTH} levels deep"):
        pass


def nested(content: Any, refusal: str) -> Iterator[Any]:
    """Yield a value and all values in it, level by level.

    Raises:
        RefusedError: With the given text, beyond ``MAX_DEPTH`` levels.
    """
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        yield from level
        level = [
            item
            for value in level
            if isinstance(value, (dict, list, tuple, set))
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise RefusedError(refusal)


def write_json(content: Mapping[str, Any] | list, path: Path) -> None:
    """Write a JSON file atomically.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        with replaced_on_success(path) as temporary:
            temporary.write_text(json.dumps(content, indent=4), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
