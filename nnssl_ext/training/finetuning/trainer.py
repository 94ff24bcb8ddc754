"""Fine-tune with a seed, any length, snapshots and frozen phases.

With ``-pretrained_weights`` it fine-tunes; without, it is the from-scratch control. Its defaults are stock's: 1,000
epochs of 250 steps, SGD, poly. Its checkpoints name stock's trainer, so that prediction needs no plug-in.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch.optim.swa_utils import AveragedModel

from nnssl_ext import checkpoint
from nnssl_ext.data.loader import Shard
from nnssl_ext.environment import check_device
from nnssl_ext.errors import UserError
from nnssl_ext.provenance import revision, versions
from nnssl_ext.settings import CommonSettings
from nnssl_ext.training.checks import check_finetuning_data
from nnssl_ext.training.distributed.ranks import rank, world
from nnssl_ext.training.distributed.store import from_the_first
from nnssl_ext.training.finetuning import state
from nnssl_ext.training.finetuning.components import (
    PEAK,
    PHASES,
    build_optimizer,
    finetune_settings,
    frozen_components,
    hold_statistics,
    moving_average,
    other_weights,
    predict_alone,
    rate_at,
    to_device,
    unwrapped,
    weighted_for,
)
from nnssl_ext.training.finetuning.evaluation import Evaluation
from nnssl_ext.training.finetuning.loaders import TRAINING, VALIDATION, SeededBatches, never_by_time, run_seed
from nnssl_ext.training.managed import ManagedTrainer
from nnssl_ext.training.memory.out_of_memory import finetuning_advice
from nnssl_ext.training.onednn import avoid_two_slice_bug
from nnssl_ext.training.pretraining.log import PlainLog
from nnssl_ext.training.run.commands import continuation
from nnssl_ext.training.run.folder import LATEST
from nnssl_ext.training.run.nonfinite import READ_EVERY
from nnssl_ext.training.wrapping import set_memory_format
from nnssl_ext.transfer.start import load_heads, pretrained_weights_argument
from nnssl_ext.views.random import step_seed


class nnsslTrainer_Finetune(ManagedTrainer):
    """Train a segmentation network with a seed.

    Settings stand under ``nnssl_ext.finetune`` in the plans.

    Raises:
        UserError: Before anything is written, for settings that cannot work.
    """

    outputs: state.Outputs
    #: ``nnssl_ext transfer`` fills the heads of equal labels for this trainer.
    takes_heads = True

    def set_up(self) -> None:
        s = self.settings
        self.logger.local_logger = PlainLog()
        self.seed = run_seed(s.seed, self.fold)
        self.initial_lr = PEAK[s.optimizer] if s.learning_rate is None else s.learning_rate
        self.weight_decay, self.save_every = s.weight_decay, s.save_every
        self.num_epochs = math.ceil(s.steps / s.steps_per_epoch)
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = s.steps_per_epoch, s.validation_iterations
        self.predicted_by = self.common.target_trainer
        self.averaged: AveragedModel | None = None
        self.held: tuple[str, ...] | None = None

    def check(
        self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device
    ) -> tuple[CommonSettings, str]:
        common, self.settings = finetune_settings(plans)
        check_device(device.type)
        check_finetuning_data(PlansManager(plans), configuration, fold, dataset_json, type(self).__name__)
        return common, self.settings.precision

    steps_per_epoch = property(lambda self: self.settings.steps_per_epoch)
    total_steps = property(lambda self: self.settings.steps)

    def initialize(self) -> None:
        torch.manual_seed(self.seed)
        super().initialize()
        avoid_two_slice_bug(self.network, self.device, self.amp_dtype)
        # a callable, since nnU-Net prints every other attribute into debug.json
        self.clip = partial(torch.nn.utils.clip_grad_norm_, list(self.network.parameters()), 12)

    def _build_loss(self) -> nn.Module:
        self.enable_deep_supervision &= hasattr(self.plain_network, "decoder")  # without one there is one output
        return weighted_for(super()._build_loss(), self.is_ddp)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        if hasattr(self.plain_network, "decoder"):
            super().set_deep_supervision_enabled(enabled)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, None]:
        # here, since stock wraps the network for DDP next, which keeps the format it finds
        set_memory_format(self.plain_network, "auto", self.device, self.amp_dtype)
        return build_optimizer(self.plain_network, self.settings, self.initial_lr), None

    def get_dataloaders(self) -> tuple[Iterator[dict], Iterable[dict]]:
        """Return loaders of the remaining training and the validation batches."""
        manager, labels = self.configuration_manager, self.label_manager
        scales = self._get_deep_supervision_scales()
        rotation, dummy_2d, initial_patch, mirror = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        shared = {
            "is_cascaded": self.is_cascaded,
            "foreground_labels": labels.foreground_labels,
            "regions": labels.foreground_regions if labels.has_regions else None,
            "ignore_label": labels.ignore_label,
        }
        masked, patch = {"use_mask_for_norm": manager.use_mask_for_norm}, manager.patch_size
        augmentation = self.get_training_transforms(patch, rotation, scales, mirror, dummy_2d, **masked, **shared)
        never_by_time(augmentation)
        workers = get_allowed_n_proc_DA()
        from_the_first("split", self.training_split)  # it may write splits_final.json
        loaders = []
        for cases, size, transforms, stream, shard, readers in zip(
            self.get_tr_and_val_datasets(),
            (initial_patch, patch),
            (augmentation, self.get_validation_transforms(scales, **shared)),
            (TRAINING, VALIDATION),
            (Shard(self.step, self.settings.steps, 1), Shard(0, self.num_val_iterations_per_epoch, 1)),
            (workers, self.validation_workers(workers)),
            strict=True,
        ):
            batches = nnUNetDataLoader(
                cases,
                self.batch_size,
                size,
                patch,
                labels,
                oversample_foreground_percent=self.oversample_foreground_percent,
                transforms=transforms,
                probabilistic_oversampling=self.probabilistic_oversampling,
            )
            seeded = SeededBatches(batches, self.seed, stream, self.num_input_channels)
            loaders.append(self.loader(seeded, shard, readers, join=itemgetter(0)))
        return iter(loaders[0]), loaders[1]

    def on_train_start(self) -> None:
        super().on_train_start()
        file = pretrained_weights_argument(sys.argv) if self.takes_heads and self.step == 0 else None
        if file is not None and (loaded := load_heads(self.plain_network, file, self.dataset_json)):
            self.print_to_log_file(f"Heads of equal labels from {file}: {len(loaded)} tensors")
        # made here: pretrained weights are loaded after the network is built
        if self.settings.weight_average_decay and self.averaged is None:
            self.averaged = moving_average(self.plain_network, self.settings.weight_average_decay)

    def before_training(self) -> None:
        # pretrained weights are given without --c only: a run that was killed at once would continue from scratch
        if self.step == 0:
            self.save_checkpoint(str(self.folder.path / LATEST))
        elif not self.snapshot_file(self.step).is_file():
            self.after_step()
        self.writer.wait()  # workers are not forked beside a write

    def on_train_epoch_start(self) -> None:
        self.network.train()
        self.held = None
        first = self.current_epoch * self.steps_per_epoch
        self.num_iterations_per_epoch = min(self.steps_per_epoch, self.total_steps - first)
        rate = rate_at(self.settings, self.initial_lr, first)
        phase = PHASES[len(frozen_components(self.settings, self.step))]
        self.print_to_log_file("")
        self.print_to_log_file(f"Epoch {self.current_epoch}")
        self.print_to_log_file(f"Current learning rate: {rate:.5g}, training {phase}")
        self.logger.log("lrs", rate, self.current_epoch)

    def train_step(self, batch: dict) -> dict:
        rate = rate_at(self.settings, self.initial_lr, self.step)
        frozen = frozen_components(self.settings, self.step)
        if frozen != self.held:  # grouping parameters takes time: once an epoch and at each release
            hold_statistics(self.plain_network, self.settings, frozen)
            self.held = frozen
        for group in self.optimizer.param_groups:
            scale = self.settings.encoder_lr_scale if group["part"] == "encoder" else 1
            group["lr"] = rate * scale * group.get("lr_scale", 1.0)
        torch.manual_seed(step_seed(self.seed, self.step, rank()))
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            output = self.network(to_device(batch["data"], self.device))
            loss = self.loss(output, to_device(batch["target"], self.device))
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
        self.clip()
        if self.grad_scaler is not None:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self.optimizer.step()
        self.step += 1
        if self.averaged is not None:
            self.averaged.update_parameters(self.plain_network)
        loss = loss.detach().float()
        return {"loss": loss.numpy() if self.device.type == "cpu" else loss}  # of a GPU later, without waiting

    def after_step(self) -> None:
        """Keep the weights if this step is a snapshot, and read the losses once in a while."""
        if self.step % READ_EVERY == 0:
            state.on_host(self.outputs)
        if self.step in self.settings.snapshots:
            self.save_checkpoint(str(self.snapshot_file(self.step)))

    def validation_step(self, batch: dict) -> dict:
        trained = self.network
        network = trained if self.averaged is None else self.averaged.module.eval()

        def as_trained(image: torch.Tensor) -> Any:
            with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                return network(image)

        # stock takes float16 on GPUs, whatever the training computes in
        self.network = network if self.device.type == "cpu" else as_trained
        try:
            return super().validation_step(batch)
        finally:
            self.network = trained

    def on_train_epoch_end(self, train_outputs: state.Outputs) -> None:
        self._refuse_spoilt(state.on_host(train_outputs))
        super().on_train_epoch_end(state.finite(train_outputs))

    def is_sound(self) -> bool:
        return not self._is_spoilt(state.on_host(self.outputs))

    def gather_outputs(self) -> state.Outputs:
        outputs = state.of_all_processes(state.on_host(self.outputs))
        self._refuse_spoilt(outputs)  # the checkpoint that is there is better
        return outputs

    def _is_spoilt(self, outputs: state.Outputs) -> bool:
        return state.is_spoilt(outputs, self.grad_scaler is not None, self.common.max_nonfinite_batches)

    def _refuse_spoilt(self, outputs: state.Outputs) -> None:
        if self._is_spoilt(outputs):
            raise UserError(state.SPOILT.format("loss", self.current_epoch, self.initial_lr))

    def epoch_lines(self) -> list[tuple[Any, ...]]:
        dice = self.logger.get_value("dice_per_class_or_region", step=-1)
        return [("Pseudo dice", [np.round(value, 4) for value in dice])]

    def is_best(self) -> bool:
        average = self.logger.get_value("ema_fg_dice", step=-1)
        best = self._best_ema is None or average > self._best_ema
        if best:
            self._best_ema = average
            self.print_to_log_file(f"New best moving average of the pseudo Dice: {average:.4f}")
        return best

    def latest_is_due(self, best: bool) -> bool:
        """Check whether checkpoint_latest.pth is due. It is never older than the best."""
        return best or super().latest_is_due(best)

    def after_training(self) -> None:
        """Leave if asked, before the validation of whole cases, which answers no signal. ``--c`` repeats it."""
        if reason := self.interruption.agreed(0):
            self.leave(reason, not self.disable_checkpointing)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Run stock's validation, or validate every snapshot."""
        predict_alone(self.network)
        with self.folder.locked() if self.local_rank == 0 else nullcontext():
            try:
                steps = () if self.disable_checkpointing else self.settings.snapshots
                absent = [step for step in steps if not self.snapshot_file(step).is_file()]
                snapshots = len(absent) < len(steps)
                if absent and rank() == 0:
                    self.print_to_log_file(f"note: no checkpoint was kept after steps {absent}: not validated")
                # only stock writes probabilities, and predictions for the next stage of a cascade
                by_stock = not snapshots or save_probabilities or bool(self.configuration_manager.next_stage_names)
                if by_stock:  # first, since its processes wait for each other
                    with other_weights(self.plain_network, self.exported_weights()):
                        super().perform_actual_validation(save_probabilities)
                if snapshots and rank() == 0:
                    self._validate_snapshots(final=not by_stock)
            except KeyboardInterrupt as error:
                if world() > 1:
                    raise
                command = continuation(self.run_name, self.device.type)
                self.print_to_log_file(f"Stopped by SIGINT in the validation. Repeat it with:\n    {command}")
                raise SystemExit(0) from error

    def _validate_snapshots(self, final: bool) -> None:
        settings, network = self.settings, self.plain_network
        evaluation = Evaluation(
            network=self.network,
            plans=self.plans_manager,
            configuration=self.configuration_manager,
            labels=self.label_manager,
            dataset_json=self.dataset_json,
            trainer_name=type(self).__name__,
            mirroring_axes=self.inference_allowed_mirroring_axes if settings.mirroring else None,
            device=self.device,
            amp_dtype=self.amp_dtype,
            cases=self.dataset_class(
                self.preprocessed_dataset_folder, self.do_split()[1], self.folder_with_segs_from_previous_stage
            ),
            truth=Path(str(self.preprocessed_dataset_folder_base)) / "gt_segmentations",
            is_cascaded=self.is_cascaded,
            log=self.print_to_log_file,
        )
        self.set_deep_supervision_enabled(False)
        for step in settings.snapshots:
            if step != settings.steps and (file := self.snapshot_file(step)).is_file():
                with other_weights(network, checkpoint.load(file)["network_weights"]):
                    evaluation.run(self.folder.path / f"validation_step_{step:06d}")
        if final:
            with other_weights(network, self.exported_weights()):
                dice = evaluation.run(self.folder.path / "validation")
            self.print_to_log_file(f"Mean Validation Dice: {dice}")
        self.set_deep_supervision_enabled(self.enable_deep_supervision)

    def snapshot_file(self, step: int) -> Path:
        """Return where the weights after ``step`` steps are kept."""
        return self.folder.path / f"checkpoint_step_{step:06d}.pth"

    @property
    def plain_network(self) -> nn.Module:
        """Return the network without DDP and torch.compile."""
        return unwrapped(self.network)

    def exported_weights(self) -> dict[str, torch.Tensor]:
        """Return the trained weights or their moving average."""
        return (self.plain_network if self.averaged is None else self.averaged.module).state_dict()

    def out_of_memory_advice(self) -> str:
        return finetuning_advice(self.batch_size, self.configuration_manager, self.device)

    def checkpoint_content(self, paths: list[Path]) -> dict[str, Any]:
        state.refuse_nonfinite(self.plain_network, self.step, self.current_epoch, self.initial_lr)
        content = {
            "network_weights": self.exported_weights(),
            "trainer_name": self.predicted_by,
            **self.stock_identity(),
            "nnssl_ext": {
                "format": checkpoint.FORMAT,
                "finetune": vars(self.settings),
                "fold": self.fold,
                "step": self.step,
                "losses": [float(step["loss"]) for step in self.outputs],
                "versions": versions(),
                "revision": revision(),
            },
        }
        if paths == [self.snapshot_file(self.step)]:  # for prediction, not to continue from
            return content
        if self.averaged is not None:
            content["nnssl_ext"]["trained_weights"] = self.plain_network.state_dict()
        return content | self.stock_state()

    def restore_content(self, content: dict[str, Any], source: str) -> None:
        own = content["nnssl_ext"]
        state.refuse_other_run(content, vars(self.settings), self.fold, source)
        if not self.was_initialized:
            self.initialize()
        try:
            self.plain_network.load_state_dict(own.get("trained_weights", content["network_weights"]))
            if "trained_weights" in own:
                self.averaged = moving_average(self.plain_network, self.settings.weight_average_decay)
                self.averaged.module.load_state_dict(content["network_weights"])
                self.averaged.n_averaged.fill_(own["step"])
        except RuntimeError as error:  # torch lists every tensor
            raise UserError(
                f"{source} belongs to another network than the plans build. Continue it with its own plans, or start "
                f"anew without --c"
            ) from error
        # nnU-Net's log takes an epoch's values once: those of an epoch that goes on are logged again
        log = {key: values[: content["current_epoch"]] for key, values in content["logging"].items()}
        self.restore_stock({**content, "logging": log})
        self.step = own["step"]
        self.outputs = [{"loss": np.array(loss, np.float32)} for loss in own.get("losses", [])]
