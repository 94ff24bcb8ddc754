"""PretrainingTrainer: the one bridge to nnUNetTrainer.

It makes stock ``nnUNetv2_train`` run a self-supervised method: nnU-Net's command, folders, logs and checkpoints; the
method's crops, views and objective. It knows no method by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from time import monotonic, time
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from tqdm import tqdm

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.environment import set_threads
from nnssl_ext.errors import UserError
from nnssl_ext.host_memory import keep_memory
from nnssl_ext.methods import Method
from nnssl_ext.networks.target import target_network
from nnssl_ext.training.checks import check_run, target_backbone
from nnssl_ext.training.distributed.heartbeat import Heartbeat
from nnssl_ext.training.distributed.ranks import mean_over_samples, rank, rank_device, world
from nnssl_ext.training.memory.out_of_memory import told_when_out_of_memory
from nnssl_ext.training.optimization import build_optimiser, clip_gradients, set_rates
from nnssl_ext.training.pretraining import state, steps
from nnssl_ext.training.pretraining.collapse import stop_when_collapsed
from nnssl_ext.training.pretraining.loaders import sample_loaders, unreadable
from nnssl_ext.training.pretraining.log import PretrainingLog
from nnssl_ext.training.pretraining.summary import print_summary
from nnssl_ext.training.run import folder as run_folder
from nnssl_ext.training.run.interruption import Interruption
from nnssl_ext.training.run.nonfinite import FiniteGuard
from nnssl_ext.training.run.writer import CheckpointWriter
from nnssl_ext.training.wrapping import arrange, engine, mixed_precision
from nnssl_ext.views.random import VALIDATION, VIEWS, BatchRandom, step_seed


class PretrainingTrainer(nnUNetTrainer):
    """Pretrains the network of a data set's plans; a subclass names the method.

    Raises:
        UserError: Before anything is written, for every input that cannot work.
    """

    method_class: ClassVar[type[Method]]
    was_initialized: bool
    dataloader_train: Any
    dataloader_val: Any
    _best_ema: float | None

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net reads this signature)
    ) -> None:
        with Heartbeat():
            self.checked = check_run(self.method_class, plans, configuration, fold, dataset_json, device)
        common = self.checked.common
        amp_dtype = mixed_precision(device, common.precision)
        continuing = bool(plans.get("continue_training"))
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.drawn = monotonic()
        set_threads(device.type)
        if common.keep_host_memory:
            keep_memory(device.type)
        self.device, self.amp_dtype = rank_device(device), amp_dtype
        # bfloat16 has the range of float32: only float16 needs its gradients scaled
        self.grad_scaler = torch.amp.GradScaler("cuda") if self.amp_dtype is torch.float16 else None
        self.num_epochs = common.epochs
        self.num_iterations_per_epoch = common.iterations_per_epoch
        self.num_val_iterations_per_epoch = common.validation_iterations
        self.save_every = common.save_every
        self.enable_deep_supervision = self.method_class.deep_supervision
        self.inference_allowed_mirroring_axes = (0, 1, 2)
        self.logger.local_logger = PretrainingLog(self.method_class.readable)
        self.step = 0
        self.outputs: steps.Outputs = []
        self.continuing = continuing
        run_folder.refuse_unshared(self, run_folder.checkpoints(self))
        self.interruption = Interruption(common.max_time, self.device)
        go_on = common.on_write_failure == "go_on"
        self.writer = CheckpointWriter(common.write_in_background, go_on, self.print_to_log_file)
        self.unreadable = unreadable(self)
        self.print_to_log_file(f"Pretraining with {self.method_class.title}: {self.method_class.citation}\n")

    def initialize(self) -> None:
        if self.was_initialized:
            raise RuntimeError("initialize was called twice")
        common, geometry = self.checked.common, self.checked.geometry
        plans = self.plans_manager, self.configuration_manager
        self.batch_size = self.checked.batch_size
        self.num_input_channels = geometry.channels

        # the initial values of everything, heads included, follow from the seed
        torch.manual_seed(common.seed)
        own_outputs = self.method_class.output_channels(self.checked.settings, geometry)
        data_outputs = self.label_manager.num_segmentation_heads
        self.data_heads: dict[str, Tensor] = {}
        if own_outputs is not None:
            self.data_heads = state.fresh_heads(target_network(*plans, geometry.channels, data_outputs))
        twice = common.activation_checkpointing
        backbone = target_backbone(*plans, geometry.channels, own_outputs or data_outputs, twice)
        self.method = self.method_class(backbone, self.checked.settings, geometry).to(self.device)
        self.network = self.method.network
        arrange(self.method, common.memory_format, self.device, self.amp_dtype)
        compiled = self._do_i_compile()
        if compiled:
            self.print_to_log_file("Using torch.compile...")
        self.objective = engine(self.method, self.device, compiled)

        self.recipe = self.method.optimizer()
        self.initial_lr = self.recipe.learning_rate if common.learning_rate is None else common.learning_rate
        self.weight_decay = self.recipe.weight_decay
        self.optimizer = build_optimiser(self.recipe, self.method.parameter_groups(), self.initial_lr)
        self.guard = FiniteGuard(self.method, self.optimizer, common.max_nonfinite_batches, self.print_to_log_file)
        self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        self.logger.update_config({"hparas": {"method": self.method.name, "initial_lr": self.initial_lr}})
        self.was_initialized = True

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The target trainer's network: what stock prediction builds to load a pretraining checkpoint."""
        return target_network(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        self.method.backbone.set_deep_supervision(enabled)

    def plot_network_architecture(self) -> None:
        """Stock draws a picture with a package that nobody has any more, and logs that it could not."""

    def get_dataloaders(self) -> tuple[Iterator[CropBatch], Iterable[CropBatch]]:
        return sample_loaders(self)

    def on_train_start(self) -> None:
        run_folder.start(self, super().on_train_start)
        state.start(self)

    def run_training(self) -> None:
        with Heartbeat(), run_folder.entered(self), self.interruption, told_when_out_of_memory(self):
            self.on_train_start()
            for _ in range(self.current_epoch, self.num_epochs):
                self.on_epoch_start()
                self.on_train_epoch_start()
                left = (self.current_epoch + 1) * self.num_iterations_per_epoch - self.step
                batches = (next(self.dataloader_train) for _ in range(left))
                self.on_train_epoch_end(steps.training_steps(self, self._progress(batches, "training")))
                self.on_validation_epoch_start()
                self.on_validation_epoch_end(
                    [self.validation_step(b) for b in self._progress(self.dataloader_val, "validation")]
                )
                self.on_epoch_end()
            self.on_train_end()

    def on_train_end(self) -> None:
        run_folder.finish(self, super().on_train_end)
        self.dataloader_train = self.dataloader_val = None  # ends the workers

    def on_train_epoch_start(self) -> None:
        self.method.train()
        self.print_to_log_file("")
        self.print_to_log_file(f"Epoch {self.current_epoch}")

    def train_step(self, batch: CropBatch) -> dict[str, Tensor]:
        """One optimiser step; the terms stay on the device, so that nothing waits for them."""
        common = self.checked.common
        total = self.num_epochs * self.num_iterations_per_epoch
        set_rates(self.optimizer, self.recipe, self.initial_lr, self.step, total)
        self.method.before_step(self.step / total)
        # dropout and the like draw from torch's own generator: the same at each step, however often we restarted
        torch.manual_seed(step_seed(common.seed, self.step, rank()))
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.remember()
        terms = self._terms(batch, VIEWS)
        # ranks may hold one sample more or less: DDP averages over ranks, the objective over samples
        loss = terms["loss"].sum() * (world() / self.checked.batch_size)
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
            self._clip()
            self.guard.judge(loss, None)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            loss.backward()
            if self.guard.judge(loss, self._clip()):
                self.optimizer.step()
        self.step += 1
        self.method.after_step(self.step / total)
        self.guard.settle(self.step, batch.cases)
        return {key: value.detach() for key, value in terms.items()}

    def validation_step(self, batch: CropBatch) -> dict[str, Tensor]:
        with torch.no_grad():
            return self._terms(batch, VALIDATION + VIEWS)

    def _terms(self, batch: CropBatch, stream: int) -> dict[str, Tensor]:
        self.unreadable.note(batch.skipped)
        if batch.failure:
            raise UserError(f"{batch.failure}; repair or remove it, then go on with --c")
        random = BatchRandom(self.checked.common.seed, stream, batch.indices, self.device)
        with torch.no_grad():
            views = self.method.views(batch, random)
        mixed = torch.autocast(self.device.type, self.amp_dtype) if self.amp_dtype is not None else nullcontext()
        with mixed:
            return self.objective(views)

    def _clip(self) -> Tensor:
        return clip_gradients(self.method.clipped_modules(), self.recipe.max_grad_norm)

    def on_train_epoch_end(self, train_outputs: list[dict[str, Tensor]]) -> None:
        means = mean_over_samples(train_outputs)
        self._refuse_non_finite(means["loss"])
        self.logger.log("lrs", max(group["lr"] for group in self.optimizer.param_groups), self.current_epoch)
        self._log_means("train", means)

    def on_validation_epoch_start(self) -> None:
        self.writer.wait()  # a checkpoint has an epoch's time; workers are not forked beside it
        self.method.eval()

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Tensor]]) -> None:
        measures = mean_over_samples(val_outputs)
        check = self.method.check_validation(measures)
        self._log_means("val", {**measures, **check.measures})
        stop_when_collapsed(self, check.collapse, check.patience)

    def _log_means(self, prefix: str, means: dict[str, float]) -> None:
        self.logger.log(f"{prefix}_losses", means.pop("loss"), self.current_epoch)
        for key, value in means.items():
            self.logger.log(f"{prefix}_{key}", value, self.current_epoch)

    def on_epoch_end(self) -> None:
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        log = self.logger.get_value
        readable = self.method.readable
        self.print_to_log_file("train_loss", np.round(log("train_losses", -1), 4))
        self.print_to_log_file("val_loss", np.round(log("val_losses", -1), 4))
        self.print_to_log_file(readable.title, np.round(log(f"val_{readable.key}", -1), 4))
        self.print_to_log_file(self.logger.local_logger.told_health())
        seconds = log("epoch_end_timestamps", -1) - log("epoch_start_timestamps", -1)
        self.print_to_log_file(f"Epoch time: {seconds:.2f} s")

        smoothed = self.logger.local_logger.smoothed_val_loss()
        best = self._best_ema is None or smoothed < self._best_ema
        if best:
            self._best_ema = smoothed
            self.print_to_log_file(f"New best moving average of the validation objective: {smoothed:.4f}")
        due = (self.current_epoch + 1) % self.save_every == 0 and self.current_epoch != self.num_epochs - 1
        run_folder.keep_epoch(self, latest=due, best=best)
        self.current_epoch += 1

    def _progress(self, batches: Iterable[CropBatch], what: str) -> Iterable[CropBatch]:
        total = self.num_iterations_per_epoch if what == "training" else self.num_val_iterations_per_epoch
        hidden = rank() > 0 or not sys.stderr.isatty()
        return tqdm(batches, f"Epoch {self.current_epoch}, {what}", total, disable=hidden, leave=False)

    def _refuse_non_finite(self, loss: float) -> None:
        if not np.isfinite(loss):
            raise UserError(
                f"the objective became {loss} in epoch {self.current_epoch}; the checkpoints of earlier epochs are "
                f"intact. Lower nnssl_ext.learning_rate (now {self.initial_lr}) and start anew"
            )

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Stock validates a segmentation here; a pretraining prints its summary and the command that uses it."""
        if self.local_rank == 0:
            print_summary(self)

    def save_checkpoint(self, *filenames: str) -> None:
        run_folder.save(self, lambda: state.collect(self), *filenames)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Continue from a checkpoint of the same run, exactly.

        Raises:
            UserError: If it is damaged, no pretraining checkpoint, or another method's or plan's.
        """
        source = "the checkpoint"
        if not isinstance(filename_or_checkpoint, dict):
            filename_or_checkpoint, source = run_folder.load(self, Path(filename_or_checkpoint))
        if not self.was_initialized:
            self.initialize()
        state.restore(self, filename_or_checkpoint, source)
