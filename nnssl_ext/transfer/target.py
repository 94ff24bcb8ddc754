"""Build a plan's network, and write the filled one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnssl_ext import checkpoint
from nnssl_ext.configurations import configuration_of, intensities_of, unusable
from nnssl_ext.errors import UserError
from nnssl_ext.files import file_digest
from nnssl_ext.networks.adaptation_plan import adaptation_plan
from nnssl_ext.networks.target import planned_network
from nnssl_ext.provenance import revision, versions
from nnssl_ext.recipe import read_json
from nnssl_ext.transfer.heads import output_names
from nnssl_ext.transfer.report import LEFT, Report
from nnssl_ext.transfer.source import PretrainedWeights, properties_of
from nnssl_ext.transfer.transfer import TargetNetwork


@dataclass(frozen=True)
class TargetPlans:
    """Name plans, a configuration and a trainer."""

    plans: PlansManager
    configuration_name: str
    dataset_json: dict[str, Any]
    trainer: str

    @property
    def configuration(self) -> ConfigurationManager:
        return self.plans.get_configuration(self.configuration_name)

    @property
    def channels(self) -> int:
        """Count the channels of the image."""
        return determine_num_input_channels(self.plans, self.configuration, self.dataset_json)


def target_plans(folder: Path, plans_name: str, configuration: str, trainer: str) -> TargetPlans:
    """Read the plans in a data set's preprocessed folder.

    Raises:
        UserError: If plans or configuration are missing, or the configuration is a cascade stage.
    """
    plans = read_json(folder / f"{plans_name}.json")
    return checked_plans(plans, read_json(folder / "dataset.json"), configuration, trainer)


def checked_plans(plans: dict[str, Any], dataset_json: dict[str, Any], configuration: str, trainer: str) -> TargetPlans:
    """Choose a configuration of plans, and the trainer that builds its network.

    Raises:
        UserError: If the plans do not have the configuration, or it is a cascade stage.
    """
    if reason := unusable(configuration, configuration_of(plans, configuration), "transfer to", flat=True):
        raise UserError(reason)
    return TargetPlans(PlansManager(plans), configuration, dataset_json, trainer)


def build_target(to: TargetPlans, seed: int) -> TargetNetwork:
    """Build the network at initial values.

    They follow from the seed. The caller's generator is not touched.

    Raises:
        UserError: If the trainer is not found or cannot build its network from these plans.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = planned_network(to.plans, to.configuration_name, to.dataset_json, to.trainer)
    # stock nnU-Net never loads heads
    takes_heads = getattr(recursive_find_trainer_class_by_name(to.trainer), "takes_heads", False)
    outputs, regions = output_names(to.dataset_json) if takes_heads else ((), False)
    return TargetNetwork(
        network,
        tuple(to.configuration.spacing),
        tuple(to.configuration.patch_size),
        tuple(to.configuration.normalization_schemes),
        tuple(map(str, to.dataset_json.get("channel_names", {}).values())),
        outputs,
        regions,
        tuple(to.configuration.use_mask_for_norm),
        properties_of(intensities_of(to.plans.plans)),
    )


def check_free(path: Path) -> None:
    """Refuse an existing file or a missing folder.

    Raises:
        UserError: In either case.
    """
    if path.exists():
        raise UserError(f"{path} exists. Give another name with -o, or remove it")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder. Make it first")


def write(
    path: Path, target: TargetNetwork, to: TargetPlans, source: PretrainedWeights, report: Report, seed: int
) -> None:
    """Write the filled network, a source for further transfers.

    Raises:
        UserError: If the file exists or cannot be written.
    """
    check_free(path)
    learned = target.backbone.learned_positions() if target.backbone else None
    content = {
        "network_weights": target.network.state_dict(),
        "trainer_name": to.trainer,
        "citations": source.citations,
        "nnssl_adaptation_plan": adaptation_plan(
            target.network,
            plans_name=to.plans.plans_name,
            configuration_name=to.configuration_name,
            configuration=to.configuration.configuration,
            intensities=intensities_of(to.plans.plans),
            patch_size=target.patch_size,
            spacing=target.spacing,
            channels=to.channels,
        ),
        "nnssl_ext": {
            "format": checkpoint.FORMAT,
            "title": "transferred weights",
            "trained": [row.name for row in report.rows if row.action != LEFT],
            "position_grid": list(learned.grid) if learned else None,
            "transfer": {
                "source": {"file": source.path.name, "kind": source.kind, "sha256": file_digest(source.path)},
                "dataset": to.plans.dataset_name,
                "seed": seed,
                "outputs": [*target.outputs],
                "regions": target.regions,
                **report.as_dict(),
            },
            "versions": versions(),
            "revision": revision(),
        },
    }
    checkpoint.save(content, path)
