"""nnsslTrainer_Finetune: stock nnU-Net's training, seeded, of any length, with snapshots and a gentler start.

With ``-pretrained_weights`` it fine-tunes; without, it is the from-scratch twin. Its defaults are stock's: 1,000 epochs
of 250 steps, SGD, poly. Its checkpoints name stock's trainer, so that prediction needs no plug-in.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from nnssl_ext import checkpoint
from nnssl_ext.environment import set_threads
from nnssl_ext.errors import UserError
from nnssl_ext.methods import OptimiserRecipe
from nnssl_ext.training.distributed import rank, rank_device
from nnssl_ext.training.engine import mixed_precision
from nnssl_ext.training.evaluation import validate
from nnssl_ext.training.finetune_parts import (
    PEAK,
    OtherWeights,
    finetune_settings,
    frozen_parts,
    moving_average,
    parameter_groups,
)
from nnssl_ext.training.optimisation import learning_rate_at
from nnssl_ext.training.preflight import target_network
from nnssl_ext.training.seeded import run_seed, seeded_loaders
from nnssl_ext.training.state import revision, versions
from nnssl_ext.views.random import step_seed


class nnsslTrainer_Finetune(nnUNetTrainer):
    """See the module's docstring. Settings stand under ``nnssl_ext.finetune`` in the plans.

    Raises:
        UserError: Before anything is written, for settings that cannot work.
    """

    _best_ema: float | None
    network: Any

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net reads this signature)
    ) -> None:
        self.common, self.settings = finetune_settings(plans)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("no CUDA device was found; use -device cpu")
        s = self.settings
        stock = "float16" if device.type == "cuda" else "float32"
        amp_dtype = mixed_precision(device, stock if s.precision == "stock" else s.precision)
        super().__init__(plans, configuration, fold, dataset_json, device)
        set_threads(device.type)
        self.device = rank_device(device)
        self.amp_dtype = amp_dtype
        self.grad_scaler = torch.amp.GradScaler("cuda") if self.amp_dtype is torch.float16 else None
        self.seed = run_seed(s.seed, fold)
        self.initial_lr = PEAK[s.optimiser] if s.learning_rate is None else s.learning_rate
        self.weight_decay = s.weight_decay
        self.schedule = OptimiserRecipe(s.optimiser, self.initial_lr, s.weight_decay, s.schedule, s.warm_up / s.steps)
        self.num_epochs = math.ceil(s.steps / s.steps_per_epoch)
        self.num_iterations_per_epoch = s.steps_per_epoch
        self.num_val_iterations_per_epoch = s.validation_iterations
        self.save_every = s.save_every
        self.step = 0
        self.predicted_by = self.common.target_trainer
        self.averaged: AveragedModel | None = None

    def initialize(self) -> None:
        torch.manual_seed(self.seed)
        super().initialize()

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The target trainer's network."""
        return target_network(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, None]:
        s = self.settings
        groups = parameter_groups(self.network)
        if (s.encoder_rate != 1 or s.freeze_encoder_steps) and not groups["encoder"]:
            raise UserError("finetune.encoder_rate and freeze_encoder_steps need a network with an 'encoder'")
        if s.head_only_steps and not groups["heads"]:
            raise UserError("finetune.head_only_steps needs a network with 'seg_layers'")
        described = [{"params": parameters, "part": part} for part, parameters in groups.items() if parameters]
        if s.optimiser == "adamw":
            return torch.optim.AdamW(described, self.initial_lr, weight_decay=s.weight_decay), None
        return torch.optim.SGD(
            described, self.initial_lr, weight_decay=s.weight_decay, momentum=0.99, nesterov=True
        ), None

    def get_dataloaders(self) -> tuple[Any, Any]:
        return seeded_loaders(self)

    def on_train_start(self) -> None:
        super().on_train_start()
        # made here: pretrained weights are loaded after the network is built
        if self.settings.average and self.averaged is None:
            self.averaged = moving_average(self.plain_network, self.settings.average)

    def on_train_epoch_start(self) -> None:
        self.network.train()
        s = self.settings
        self.num_iterations_per_epoch = min(s.steps_per_epoch, s.steps - self.step)
        rate = self._rate()
        self.print_to_log_file("")
        self.print_to_log_file(f"Epoch {self.current_epoch}")
        self.print_to_log_file(f"Current learning rate: {rate:.5g}, training {self._phase()}")
        self.logger.log("lrs", rate, self.current_epoch)

    def train_step(self, batch: dict) -> dict:
        rate, frozen = self._rate(), frozen_parts(self.settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * (self.settings.encoder_rate if group["part"] == "encoder" else 1)
        torch.manual_seed(step_seed(self.seed, self.step, rank()))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch)
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
        else:
            loss.backward()
        # a parameter without a gradient is left alone: no decay, no momentum
        for group in self.optimizer.param_groups:
            if group["part"] in frozen:
                for parameter in group["params"]:
                    parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        if self.grad_scaler is not None:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self.optimizer.step()
        self.step += 1
        if self.averaged is not None:
            self.averaged.update_parameters(self.plain_network)
        if self.step in self.settings.snapshots:
            self.save_checkpoint(str(self.snapshot_file(self.step)))
        return {"loss": loss.detach().float().cpu().numpy()}

    def _loss(self, batch: dict) -> torch.Tensor:
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"]
        if isinstance(target, list):
            target = [part.to(self.device, non_blocking=True) for part in target]
        else:
            target = target.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self.amp_dtype) if self.amp_dtype is not None else nullcontext():
            return self.loss(self.network(data), target)

    def validation_step(self, batch: dict) -> dict:
        if self.averaged is None:
            return super().validation_step(batch)
        trained, self.network = self.network, self.averaged.module
        try:
            return super().validation_step(batch)
        finally:
            self.network = trained

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        loss = self.logger.get_value("train_losses", step=-1)
        if not np.isfinite(loss):
            raise UserError(
                f"the loss became {loss} in epoch {self.current_epoch}; the checkpoints of earlier epochs are intact. "
                f"Lower finetune.learning_rate (now {self.initial_lr}) and start anew"
            )

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Stock's validation; with snapshots each of them and the end, case by case in this process."""
        snapshots = [step for step in self.settings.snapshots if self.snapshot_file(step).is_file()]
        if not snapshots:
            with self._weights(self.exported_weights()):
                super().perform_actual_validation(save_probabilities)
            return
        if rank() > 0:
            return
        final = self.exported_weights()
        for step in snapshots:
            if step == self.settings.steps:
                continue
            weights = checkpoint.load(self.snapshot_file(step))["network_weights"]
            with self._weights(weights):
                validate(self, Path(self.output_folder) / f"validation_step_{step:06d}", self.settings.mirroring)
        with self._weights(final):
            dice = validate(self, Path(self.output_folder) / "validation", self.settings.mirroring)
        self.print_to_log_file(f"Mean Validation Dice: {dice}")

    def snapshot_file(self, step: int) -> Path:
        """Where the weights after ``step`` steps are kept."""
        return Path(self.output_folder) / f"checkpoint_step_{step:06d}.pth"

    @property
    def plain_network(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network
        network = network.module if isinstance(network, DistributedDataParallel) else network
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def exported_weights(self) -> dict[str, torch.Tensor]:
        """What is validated and written: the trained weights or their moving average."""
        network = self.plain_network if self.averaged is None else self.averaged.module
        return network.state_dict()

    def _weights(self, weights: dict[str, torch.Tensor]) -> OtherWeights:
        return OtherWeights(self.plain_network, weights)

    def _rate(self) -> float:
        return learning_rate_at(self.schedule, self.initial_lr, self.step, self.settings.steps)

    def _phase(self) -> str:
        frozen = frozen_parts(self.settings, self.step)
        return {0: "everything", 1: "decoder and heads", 2: "heads"}[len(frozen)]

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        content = {
            "network_weights": self.exported_weights(),
            "trainer_name": self.predicted_by,
            "init_args": self.my_init_kwargs,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "current_epoch": self.current_epoch + 1,
            "nnssl_ext": {
                "format": checkpoint.FORMAT,
                "finetune": vars(self.settings),
                "fold": self.fold,
                "step": self.step,
                "versions": versions(),
                "revision": revision(),
            },
        }
        if Path(filename) != self.snapshot_file(self.step):
            scaler = self.grad_scaler
            content |= {
                "optimizer_state": self.optimizer.state_dict(),
                "grad_scaler_state": scaler.state_dict() if scaler is not None else None,
                "logging": self.logger.get_checkpoint(),
                "_best_ema": self._best_ema,
            }
            if self.averaged is not None:
                content["nnssl_ext"]["trained_weights"] = self.plain_network.state_dict()
        checkpoint.save(content, Path(filename))

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Continue from a checkpoint of the same run, exactly.

        Raises:
            UserError: If it is damaged, or another run's.
        """
        content = filename_or_checkpoint
        if not isinstance(content, dict):
            content = checkpoint.load(Path(content))
        own = content["nnssl_ext"]
        if own.get("finetune") != vars(self.settings) or str(own.get("fold")) != str(self.fold):
            raise UserError(
                f"{self.output_folder} holds a run with other finetune settings or another fold; continue it with its "
                f"own plans, or start anew without --c"
            )
        if not self.was_initialized:
            self.initialize()
        self.plain_network.load_state_dict(own.get("trained_weights", content["network_weights"]))
        if "trained_weights" in own:
            self.averaged = moving_average(self.plain_network, self.settings.average)
            self.averaged.module.load_state_dict(content["network_weights"])
            self.averaged.n_averaged.fill_(own["step"])
        self.optimizer.load_state_dict(content["optimizer_state"])
        if self.grad_scaler is not None and content["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(content["grad_scaler_state"])
        self.my_init_kwargs = content["init_args"]
        self.current_epoch, self.step = content["current_epoch"], own["step"]
        self.logger.load_checkpoint(content["logging"])
        self._best_ema = content["_best_ema"]
        self.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]
