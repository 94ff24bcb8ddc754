"""nnsslTrainer_Finetune: stock nnU-Net's training, seeded, of any length, with snapshots and a gentler start.

With ``-pretrained_weights`` it fine-tunes; without, it is the from-scratch twin. Its defaults are stock's: 1,000 epochs
of 250 steps, SGD, poly. Its checkpoints name stock's trainer, so that prediction needs no plug-in. Its folder and its
ending are looked after like a pretraining's.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from time import monotonic, time
from typing import Any, NoReturn

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from nnssl_ext.environment import check_device, set_threads
from nnssl_ext.errors import UserError
from nnssl_ext.host_memory import keep_memory
from nnssl_ext.methods import OptimizerRecipe
from nnssl_ext.training.checks import target_network
from nnssl_ext.training.distributed.ranks import rank, rank_device
from nnssl_ext.training.finetuning import state as finetune_state
from nnssl_ext.training.finetuning import steps as finetune_steps
from nnssl_ext.training.finetuning.components import (
    PEAK,
    OtherWeights,
    finetune_settings,
    frozen_parts,
    hold_statistics,
    moving_average,
    parameter_groups,
    predict_alone,
)
from nnssl_ext.training.finetuning.evaluation import validate_snapshots
from nnssl_ext.training.finetuning.loaders import run_seed, seeded_loaders
from nnssl_ext.training.memory.out_of_memory import finetuning_described, told_when_out_of_memory
from nnssl_ext.training.optimization import learning_rate_at
from nnssl_ext.training.pretraining.log import PlainLog
from nnssl_ext.training.run import folder as run_folder
from nnssl_ext.training.run.interruption import Interruption
from nnssl_ext.training.run.writer import CheckpointWriter
from nnssl_ext.training.wrapping import mixed_precision, right_in_bfloat16
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
        check_device(device.type)
        s = self.settings
        stock = "float16" if device.type == "cuda" else "float32"
        amp_dtype = mixed_precision(device, stock if s.precision == "stock" else s.precision)
        self.continuing = bool(plans.get("continue_training"))
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.logger.local_logger = PlainLog()
        self.drawn = monotonic()
        set_threads(device.type)
        if self.common.keep_host_memory:
            keep_memory(device.type)
        self.device = rank_device(device)
        self.amp_dtype = amp_dtype
        self.grad_scaler = torch.amp.GradScaler("cuda") if self.amp_dtype is torch.float16 else None
        self.seed = run_seed(s.seed, fold)
        self.initial_lr = PEAK[s.optimizer] if s.learning_rate is None else s.learning_rate
        self.weight_decay = s.weight_decay
        self.schedule = OptimizerRecipe(s.optimizer, self.initial_lr, s.weight_decay, s.schedule, s.warmup / s.steps)
        self.num_epochs = math.ceil(s.steps / s.steps_per_epoch)
        self.num_iterations_per_epoch = s.steps_per_epoch
        self.num_val_iterations_per_epoch = s.validation_iterations
        self.save_every = s.save_every
        self.step = 0
        self.outputs: finetune_state.Outputs = []
        self.interruption = Interruption(self.common.max_time, self.device)
        go_on = self.common.on_write_failure == "go_on"
        self.writer = CheckpointWriter(self.common.write_in_background, go_on, self.print_to_log_file)
        self.predicted_by = self.common.target_trainer
        self.averaged: AveragedModel | None = None

    def initialize(self) -> None:
        torch.manual_seed(self.seed)
        super().initialize()
        right_in_bfloat16(self.network, self.device, self.amp_dtype)

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
        if (s.encoder_lr_scale != 1 or s.freeze_encoder_steps) and not groups["encoder"]:
            raise UserError("finetune.encoder_lr_scale and freeze_encoder_steps need a network with an 'encoder'")
        if s.head_only_steps and not groups["heads"]:
            raise UserError("finetune.head_only_steps needs a network with 'seg_layers'")
        described = [{"params": parameters, "part": part} for part, parameters in groups.items() if parameters]
        if s.optimizer == "adamw":
            return torch.optim.AdamW(described, self.initial_lr, weight_decay=s.weight_decay), None
        return torch.optim.SGD(
            described, self.initial_lr, weight_decay=s.weight_decay, momentum=0.99, nesterov=True
        ), None

    def get_dataloaders(self) -> tuple[Any, Any]:
        return seeded_loaders(self)

    def on_train_start(self) -> None:
        super().on_train_start()
        # made here: pretrained weights are loaded after the network is built
        if self.settings.weight_average_decay and self.averaged is None:
            self.averaged = moving_average(self.plain_network, self.settings.weight_average_decay)

    def run_training(self) -> None:
        with run_folder.entered(self), self.interruption, told_when_out_of_memory(self, finetuning_described):
            self.on_train_start()
            finetune_steps.keep_first(self)
            for _ in range(self.current_epoch, self.num_epochs):
                self.on_epoch_start()
                self.on_train_epoch_start()
                self.on_train_epoch_end(finetune_steps.training_steps(self))
                self.writer.wait()  # a checkpoint has an epoch's time; workers are not forked beside it
                with torch.no_grad():
                    self.on_validation_epoch_start()
                    batches = (next(self.dataloader_val) for _ in range(self.num_val_iterations_per_epoch))
                    self.on_validation_epoch_end([self.validation_step(batch) for batch in batches])
                self.outputs = []
                self.on_epoch_end()
            run_folder.finish(self, self.on_train_end)
            finetune_steps.leave_before_validation(self)

    def on_train_epoch_start(self) -> None:
        self.network.train()
        s = self.settings
        first = self.current_epoch * s.steps_per_epoch
        self.num_iterations_per_epoch = min(s.steps_per_epoch, s.steps - first)
        rate = learning_rate_at(self.schedule, self.initial_lr, first, s.steps)
        self.print_to_log_file("")
        self.print_to_log_file(f"Epoch {self.current_epoch}")
        self.print_to_log_file(f"Current learning rate: {rate:.5g}, training {self._phase()}")
        self.logger.log("lrs", rate, self.current_epoch)

    def train_step(self, batch: dict) -> dict:
        rate = learning_rate_at(self.schedule, self.initial_lr, self.step, self.settings.steps)
        frozen = frozen_parts(self.settings, self.step)
        hold_statistics(self.plain_network, self.settings, frozen)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * (self.settings.encoder_lr_scale if group["part"] == "encoder" else 1)
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
        trained, self.network = self.network, self.averaged.module.eval()
        try:
            return super().validation_step(batch)
        finally:
            self.network = trained

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(finetune_steps.finite_steps(self, train_outputs))

    def refuse_loss(self, loss: float) -> NoReturn:
        """End a run that cannot recover.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"the loss became {loss} in epoch {self.current_epoch}; the checkpoints of earlier epochs are intact. "
            f"Lower finetune.learning_rate (now {self.initial_lr}) and start anew"
        )

    def on_epoch_end(self) -> None:
        """Stock's, but that checkpoint_latest.pth knows the best so far, and no run ends for a picture."""
        log = self.logger.get_value
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        for name, key in (("train_loss", "train_losses"), ("val_loss", "val_losses")):
            self.print_to_log_file(name, np.round(log(key, step=-1), 4))
        self.print_to_log_file("Pseudo dice", [np.round(d, 4) for d in log("dice_per_class_or_region", step=-1)])
        seconds = log("epoch_end_timestamps", step=-1) - log("epoch_start_timestamps", step=-1)
        self.print_to_log_file(f"Epoch time: {seconds:.2f} s")
        average = log("ema_fg_dice", step=-1)
        best = self._best_ema is None or average > self._best_ema
        if best:
            self._best_ema = average
            self.print_to_log_file(f"New best moving average of the pseudo Dice: {average:.4f}")
        # --c takes checkpoint_latest.pth, which is there from the start: it must never be older than the best
        due = ((self.current_epoch + 1) % self.save_every == 0 or best) and self.current_epoch != self.num_epochs - 1
        run_folder.keep_epoch(self, latest=due, best=best)
        self.current_epoch += 1

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Stock's validation; with snapshots each of them and the end, case by case in this process."""
        predict_alone(self.network)
        with run_folder.locked(Path(self.output_folder)) if self.local_rank == 0 else nullcontext():
            if not any(self.snapshot_file(step).is_file() for step in self.settings.snapshots):
                with self._weights(self.exported_weights()):
                    super().perform_actual_validation(save_probabilities)
            elif rank() == 0:
                validate_snapshots(self)

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

    def _phase(self) -> str:
        return {0: "everything", 1: "decoder and heads", 2: "heads"}[len(frozen_parts(self.settings, self.step))]

    def save_checkpoint(self, *filenames: str) -> None:
        complete = [Path(name) for name in filenames] != [self.snapshot_file(self.step)]
        run_folder.save(self, lambda: finetune_state.collect(self, complete), *filenames)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Continue from a checkpoint of the same run, exactly.

        Raises:
            UserError: If it is damaged, or another run's.
        """
        source = "the checkpoint"
        if not isinstance(filename_or_checkpoint, dict):
            filename_or_checkpoint, source = run_folder.load(self, Path(filename_or_checkpoint))
        finetune_state.restore(self, filename_or_checkpoint, source)
