"""Export a pretraining as folder, safetensors or zip."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Template

from nnssl_ext import checkpoint
from nnssl_ext.commands import dataset_word
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.transfer.locate import CONFIG, NOTE, PLAN, SAFETENSORS, WEIGHTS
from nnssl_ext.transfer.names import canonical_weights

#: Entries of our section that are exported. Heads, teachers and the data position are for the run that continues.
EXPORTED = (
    "format",
    "method",
    "title",
    "settings",
    "trained",
    "position_grid",
    "counters",
    "training_cases",
    "versions",
    "revision",
    "hardware",
)
#: Files that nnUNetv2_export_model_to_zip packs and every training writes.
PACKED = ("progress.png", "../plans.json", "../dataset.json", "../dataset_fingerprint.json")


def finished_run(path: Path) -> tuple[Path, dict[str, Any]]:
    """Load a pretraining checkpoint from file or fold folder.

    Raises:
        UserError: If there is none, or it is not that of a pretraining.
    """
    file = path / WEIGHTS if path.is_dir() else path
    content = checkpoint.load(file)
    if "method" not in content["nnssl_ext"] or "init_args" not in content:
        raise UserError(f"{file} was not written by a pretraining run (but by nnssl_ext transfer or export?)")
    return file, content


def export_folder(content: Mapping[str, Any], folder: Path, name: str, license_name: str, safetensors: bool) -> None:
    """Write the folder for Hugging Face, whole or not.

    Args:
        content: The content of a pretraining checkpoint.
        folder: Must not exist.
        name: The model's name on its card.
        license_name: Hugging Face's identifier, such as cc-by-4.0; '' leaves a line to be filled in.
        safetensors: Whether to write the weights in that format too.

    Raises:
        UserError: If the folder exists or cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder} exists. Give another name with -o, or remove it")
    try:
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    try:
        own = {key: value for key, value in content["nnssl_ext"].items() if key in EXPORTED}
        own["settings"] = _without_folders(own["settings"])
        kept = ("network_weights", "nnssl_adaptation_plan", "citations", "trainer_name")
        checkpoint.save({**{key: content[key] for key in kept}, "nnssl_ext": own}, temporary / WEIGHTS)
        plan = {**content["nnssl_adaptation_plan"], "citations": content["citations"]}
        write_json(plan, temporary / PLAN)
        write_json(_config(content), temporary / CONFIG)
        (temporary / "README.md").write_text(model_card(content, name, license_name), encoding="utf-8")
        if safetensors:
            _save_safetensors(content, temporary / SAFETENSORS)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {folder}: {error.strerror}") from error
        raise


def _without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Cut the files that settings name to their last part: where they lay is nobody's business."""
    common = settings["common"]
    named = {key: Path(common[key]).name for key in ("start_from", "images") if common.get(key)}
    return {**settings, "common": {**common, **named}}


def model_card(content: Mapping[str, Any], name: str, license_name: str) -> str:
    """Write a model's README from its records."""
    own, plan, arguments = content["nnssl_ext"], content["nnssl_adaptation_plan"], content["init_args"]
    configuration = _configuration(plan)
    weights = canonical_weights(content["network_weights"])
    card = Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8")
    template = Template(card, keep_trailing_newline=True)
    return template.render(
        name=name,
        license=license_name,
        title=own["title"],
        architecture=plan["architecture_plans"]["arch_class_name"],
        citations=[text for entry in content["citations"] for text in entry.get("apa_citations", ())],
        parameters=f"{sum(tensor.numel() for tensor in weights.values()):,}",
        dataset=arguments["plans"]["dataset_name"],
        fold=arguments["fold"],
        training_cases=own["training_cases"],
        channels=plan["pretrain_num_input_channels"],
        spacing=" x ".join(f"{edge:g}" for edge in configuration["spacing"]),
        patch_size=" x ".join(map(str, configuration["patch_size"])),
        normalization=", ".join(configuration["normalization_schemes"]),
        steps=f"{own['counters']['step']:,}",
        batch_size=own["counters"]["samples"] // max(own["counters"]["step"], 1),
        seed=own["settings"]["common"]["seed"],
        hardware=own.get("hardware", "not recorded"),
        revision=own["revision"],
        versions=", ".join(f"{package} {number}" for package, number in own["versions"].items()),
        command=training_command(content),
        settings=json.dumps(_without_folders(own["settings"]), indent=2),
    )


def training_command(content: Mapping[str, Any]) -> str:
    """Rebuild the command that made a checkpoint."""
    return shlex.join(["nnUNetv2_train", *_identity(content), "-tr", content["trainer_name"], *_plans_option(content)])


def prepare_zip(file: Path, content: Mapping[str, Any]) -> str:
    """Complete a run for zipping. Return the command.

    Stock packs validation/summary.json of every fold. A pretraining has no segmentation to validate, so its own
    summary is put there.

    Raises:
        UserError: If another file that stock packs is missing.
    """
    fold = file.parent
    missing = [str(fold / name) for name in PACKED if not (fold / name).is_file()]
    if missing:
        raise UserError(f"nnUNetv2_export_model_to_zip will miss {missing[0]}. Export from nnUNet_results itself")
    summary = fold / "validation" / "summary.json"
    if not summary.exists():
        own = fold / "pretraining_summary.json"
        summary.parent.mkdir(exist_ok=True)
        note = {"pretraining": read_json(own) if own.is_file() else {}}
        write_json({"metric_per_case": [], "mean": {}, "foreground_mean": {}, **note}, summary)
    dataset, configuration, number = _identity(content)
    words = ["nnUNetv2_export_model_to_zip", "-d", dataset, "-c", configuration, "-f", number]
    words += ["-tr", content["trainer_name"], *_plans_option(content), "-chk", file.name]
    return shlex.join([*words, "-o", f"{content['trainer_name']}.zip"])


def _identity(content: Mapping[str, Any]) -> tuple[str, str, str]:
    """List data set, configuration and fold."""
    arguments = content["init_args"]
    return dataset_word(arguments["plans"]["dataset_name"]), arguments["configuration"], str(arguments["fold"])


def _plans_option(content: Mapping[str, Any]) -> list[str]:
    name = content["init_args"]["plans"]["plans_name"]
    return [] if name == "nnUNetPlans" else ["-p", name]


def _config(content: Mapping[str, Any]) -> dict[str, Any]:
    plan = content["nnssl_adaptation_plan"]
    configuration = _configuration(plan)
    return {
        "model_type": "nnssl_ext",
        "architectures": [plan["architecture_plans"]["arch_class_name"]],
        "method": content["nnssl_ext"]["method"],
        "num_channels": plan["pretrain_num_input_channels"],
        "patch_size": configuration["patch_size"],
        "spacing": configuration["spacing"],
        "normalization_schemes": configuration["normalization_schemes"],
    }


def _configuration(plan: Mapping[str, Any]) -> dict[str, Any]:
    return next(iter(plan["pretrain_plan"]["configurations"].values()))


def _save_safetensors(content: Mapping[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    weights, own = content["network_weights"], content["nnssl_ext"]
    noted = {name: own.get(name) for name in ("title", "trained", "position_grid")}
    noted["weights_sha256"] = checkpoint.digest(canonical_weights(weights))
    # a U-Net names one tensor up to four times. The format holds each once, here under its first name
    first: dict[Any, str] = {}
    for name, tensor in weights.items():
        first.setdefault((tensor.data_ptr() or name, tensor.shape), name)
    save_file({name: weights[name] for name in first.values()}, str(path), {NOTE: json.dumps(noted)})
    path.chmod(0o644)  # the library writes with mode 600
