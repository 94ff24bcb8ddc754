"""Run a self-supervised method in stock ``nnUNetv2_train``.

nnU-Net gives the command, folders, logs and checkpoints; the method gives crops, views and objective. The trainer
knows no method by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.commands import OCCASIONS, recipe_commands
from nnssl_ext.configurations import intensities_of
from nnssl_ext.data.cases import stored_as
from nnssl_ext.data.crops import CropBatch
from nnssl_ext.data.loader import Shard
from nnssl_ext.environment import worker_count
from nnssl_ext.errors import UserError
from nnssl_ext.methods import Method
from nnssl_ext.networks.adaptation_plan import adaptation_plan
from nnssl_ext.networks.target import target_network
from nnssl_ext.networks.weight_length import convolution_lengths, length_factors
from nnssl_ext.recipe import write_json
from nnssl_ext.settings import CommonSettings
from nnssl_ext.training.checks import check_run, target_backbone
from nnssl_ext.training.distributed.ranks import mean_over_samples, rank, world
from nnssl_ext.training.distributed.store import from_the_first
from nnssl_ext.training.managed import ManagedTrainer
from nnssl_ext.training.memory.out_of_memory import pretraining_advice
from nnssl_ext.training.onednn import avoid_two_slice_bug
from nnssl_ext.training.optimization import build_optimizer, clip_gradients, set_rates
from nnssl_ext.training.pretraining import state
from nnssl_ext.training.pretraining.log import PretrainingLog, log_means
from nnssl_ext.training.pretraining.picture import PretextPicture, Rows
from nnssl_ext.training.pretraining.summary import summary_text, tuned_run
from nnssl_ext.training.pretraining.unreadable import Unreadable
from nnssl_ext.training.run.folder import BEST, FINAL, LATEST
from nnssl_ext.training.run.nonfinite import FiniteGuard
from nnssl_ext.training.wrapping import set_memory_format, wrap_for_training
from nnssl_ext.transfer.start import pretrained_weights_argument
from nnssl_ext.views.random import VALIDATION, VIEWS, BatchRandom, step_seed


class PretrainingTrainer(ManagedTrainer):
    """Pretrain the network of a data set's plans.

    A subclass names the method.

    Raises:
        UserError: Before anything is written, for every input that cannot work.
    """

    method_class: ClassVar[type[Method]]
    outputs: state.Outputs

    def set_up(self) -> None:
        common, samples = self.common, self.checked.samples
        self.num_epochs = common.epochs
        self.num_iterations_per_epoch = common.iterations_per_epoch
        self.num_val_iterations_per_epoch = common.validation_iterations
        self.save_every = common.save_every
        self.enable_deep_supervision = self.method_class.deep_supervision
        self.inference_allowed_mirroring_axes = (0, 1, 2)
        self.filled: list[str] = []
        self.log = self.logger.local_logger = PretrainingLog(self.method_class.readable)
        self.pretext = PretextPicture(
            self.folder.path / "pretext.png", common.pretext_picture_every, common.epochs, self.print_to_log_file
        )
        limit = common.max_unreadable_fraction
        self.unreadable = Unreadable(samples.kind, len(samples), limit, self.print_to_log_file)
        self.unreadable.note(samples.left_out())
        self.print_to_log_file(f"Pretraining with {self.method_class.title}: {self.method_class.citation}\n")

    def check(
        self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device
    ) -> tuple[CommonSettings, str]:
        self.checked = check_run(self.method_class, plans, configuration, fold, dataset_json, device)
        return self.checked.common, self.checked.common.precision

    @property
    def steps_per_epoch(self) -> int:
        return self.common.iterations_per_epoch

    @property
    def total_steps(self) -> int:
        return self.num_epochs * self.steps_per_epoch

    def initialize(self) -> None:
        if self.was_initialized:
            raise RuntimeError("initialize was called twice")
        common, geometry, settings = self.common, self.checked.geometry, self.checked.settings
        plans = self.plans_manager, self.configuration_manager
        self.batch_size = self.checked.batch_size
        self.num_input_channels = geometry.channels

        # the initial values of everything, heads included, follow from the seed
        torch.manual_seed(common.seed)
        own_outputs = self.method_class.output_channels(settings, geometry)
        data_outputs = self.label_manager.num_segmentation_heads
        self.data_heads: dict[str, Tensor] = {}
        if own_outputs is not None:
            self.data_heads = state.fresh_heads(target_network(*plans, geometry.channels, data_outputs))
        twice = common.activation_checkpointing
        backbone = target_backbone(*plans, geometry.channels, own_outputs or data_outputs, twice)
        self.method = self.method_class(backbone, settings, geometry).to(self.device)
        self.network = self.method.network
        self.initial_lengths = convolution_lengths(self.network)
        avoid_two_slice_bug(self.method, self.device, self.amp_dtype)
        set_memory_format(self.method, common.memory_format, self.device, self.amp_dtype)
        compiled = self._do_i_compile()
        if compiled:
            self.print_to_log_file("Using torch.compile...")
        self.objective = wrap_for_training(self.method, self.device, compiled)

        self.recipe = self.method.optimizer()
        self.initial_lr = self.recipe.learning_rate if common.learning_rate is None else common.learning_rate
        self.weight_decay = self.recipe.weight_decay
        self.optimizer = build_optimizer(self.recipe, self.method.parameter_groups(), self.initial_lr)
        # lists are built once; a callable, since nnU-Net prints every other attribute into debug.json
        clipped = [list(module.parameters()) for module in self.method.clipped_modules()]
        self.clip = partial(clip_gradients, clipped, self.recipe.max_grad_norm)
        self.guard = FiniteGuard(self.method, self.optimizer, common.max_nonfinite_batches, self.print_to_log_file)
        self.dataset_class = stored_as(Path(self.preprocessed_dataset_folder))
        self.logger.update_config({"hparas": {"method": self.method.name, "initial_lr": self.initial_lr}})
        self.was_initialized = True

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        self.method.backbone.set_deep_supervision(enabled)

    def plot_network_architecture(self) -> None:
        """Draw nothing, since stock needs an outdated package for it."""

    def get_dataloaders(self) -> tuple[Iterator[CropBatch], Iterable[CropBatch]]:
        checked = self.checked
        request = self.method.crops(checked.settings, checked.geometry)
        # nnU-Net writes a split where there is none yet
        datasets = checked.samples.datasets(
            request, self.common.seed, lambda: from_the_first("split", self.training_split), self.print_to_log_file
        )
        place, workers = (self.batch_size, rank(), world()), worker_count()
        validation = Shard(0, self.num_val_iterations_per_epoch, *place)
        return (
            iter(self.loader(datasets[0], Shard(self.step, self.total_steps, *place), workers)),
            self.loader(datasets[1], validation, self.validation_workers(workers)),
        )

    def on_train_start(self) -> None:
        super().on_train_start()
        chosen = str(self.method)
        if chosen != self.method.title:
            self.print_to_log_file(chosen)
        if self.step:
            return
        if self.common.start_from is not None:
            text, self.filled = state.start_from(self.method, self.common.start_from)
            self.print_to_log_file(text)
            return
        if (file := pretrained_weights_argument(sys.argv)) is not None:
            self.filled = state.filled_by(self.method, file)
        if self.method.exported is not self.method.network:  # stock's -pretrained_weights fill the network alone
            self.method.exported.load_state_dict(self.method.network.state_dict())

    def on_train_epoch_start(self) -> None:
        self.method.train()
        self.print_to_log_file("")
        self.print_to_log_file(f"Epoch {self.current_epoch}")

    def train_step(self, batch: CropBatch) -> dict[str, Tensor]:
        """Do one optimizer step. The host does not wait for its terms."""
        set_rates(self.optimizer, self.recipe, self.initial_lr, self.step, self.total_steps)
        self.method.before_step(self.step / self.total_steps)
        # dropout and the like draw from torch's own generator: the same at each step, however often a run restarts
        torch.manual_seed(step_seed(self.common.seed, self.step, rank()))
        self.optimizer.zero_grad(set_to_none=True)
        with self.guard.step(self.step + 1, batch.cases) as allows:
            terms = self._terms(batch, VIEWS)
            # ranks may hold one sample more or less: DDP averages over ranks, the objective over samples
            loss = terms["loss"].sum() * (world() / self.checked.batch_size)
            if self.grad_scaler is not None:
                self.grad_scaler.scale(loss).backward()
                self.grad_scaler.unscale_(self.optimizer)
                self.clip()
                allows(loss, None)
                self.grad_scaler.step(self.optimizer)
                self.grad_scaler.update()
            else:
                loss.backward()
                if allows(loss, self.clip()):
                    self.optimizer.step()
            self.step += 1
            self.method.after_step(self.step / self.total_steps)
        return {key: value.detach() for key, value in terms.items()}

    def after_step(self) -> None:
        if self.step == self._last_step_of_epoch() or self.guard.problem:
            self.guard.read()  # all processes together
        if self.guard.problem:
            self.keep_progress_together()
            raise UserError(self.guard.problem)

    def is_sound(self) -> bool:
        self.guard.read()
        return self.guard.is_sound()

    def gather_outputs(self) -> state.Outputs:
        self.guard.read()
        return state.of_all_processes(self.outputs)

    def validation_step(self, batch: CropBatch) -> dict[str, Tensor]:
        with torch.no_grad():
            terms = self._terms(batch, VALIDATION + VIEWS)
        if self.local_rank == 0:
            self.pretext.keep(batch, self.method.picture_samples)
        return terms

    def _terms(self, batch: CropBatch, stream: int) -> dict[str, Tensor]:
        self.unreadable.note(batch.skipped)
        if batch.failure:
            raise UserError(f"{batch.failure}. Repair it, then go on with --c")
        views = self._views(batch, stream)
        with self.autocast():
            return self.objective(views)

    def _views(self, batch: CropBatch, stream: int) -> dict[str, Tensor]:
        random = BatchRandom(self.common.seed, stream, batch.indices, self.device)
        with torch.no_grad():
            return self.method.views(batch, random)

    def _show(self, batch: CropBatch) -> Rows:
        views = self._views(batch, VALIDATION + VIEWS)
        with self.autocast(), torch.no_grad():
            return self.method.picture(views)

    def before_training(self) -> None:
        # they are given without --c only: a run that was killed in its first epoch would continue without them
        if self.step == 0 and pretrained_weights_argument(sys.argv):
            self.save_checkpoint(str(self.folder.path / LATEST))
            self.writer.wait()

    def on_train_epoch_end(self, train_outputs: state.Outputs) -> None:
        means = mean_over_samples(train_outputs)
        if not np.isfinite(means["loss"]):
            raise UserError(
                f"the objective became {means['loss']} in epoch {self.current_epoch}. The checkpoints of earlier "
                f"epochs are intact. Lower nnssl_ext.learning_rate (now {self.initial_lr}) and start anew"
            )
        self.logger.log("lrs", max(group["lr"] for group in self.optimizer.param_groups), self.current_epoch)
        log_means(self.logger, "train", means, self.current_epoch)

    def on_validation_epoch_start(self) -> None:
        self.method.eval()

    def on_validation_epoch_end(self, val_outputs: state.Outputs) -> None:
        measures = mean_over_samples(val_outputs)
        check = self.method.check_validation(measures)
        log_means(self.logger, "val", {**measures, **check.measures}, self.current_epoch)
        self.pretext.update(self.current_epoch, self.method.title, self.checked.geometry.spacing, self._show)
        if check.collapse:
            self.print_to_log_file(f"Sign of a collapse: {check.collapse}")
        if check.solved:
            self.print_to_log_file(f"Solved: {check.solved}")
        if self.log.has_collapsed(bool(check.collapse), check.patience, self.current_epoch):
            raise UserError(
                f"the features have collapsed ({check.patience} epochs in a row): {check.collapse}. Earlier "
                f"checkpoints are intact"
            )

    def epoch_lines(self) -> list[tuple[Any, ...]]:
        readable = self.method.readable
        value = self.logger.get_value(f"val_{readable.key}", -1)
        return [(readable.title, np.round(value, 4)), (self.log.health_text(),)]

    def is_best(self) -> bool:
        smoothed = self.log.smoothed_val_loss()
        best = self._best_ema is None or smoothed < self._best_ema
        if best:
            self._best_ema = smoothed
            self.print_to_log_file(f"New best moving average of the validation objective: {smoothed:.4f}")
        return best

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Write and print a summary in the place of a validation."""
        if self.local_rank != 0:
            return
        name, readable, log = self.run_name, self.method.readable, self.log.my_fantastic_logging
        losses, values = log["val_losses"], log[f"val_{readable.key}"]
        # an epoch that was stopped has no end
        times = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
        content: dict[str, Any] = {
            "method": self.method.title,
            "dataset": name.dataset,
            "plans": name.plans,
            "configuration": name.configuration,
            "fold": self.fold,
            "training_cases": self.checked.training_cases,
            "epochs": len(losses),
            "steps": self.step,
            "batch_size": self.checked.batch_size,
            "hours": sum(end - start for start, end in times) / 3600,
            "objective_first": losses[0],
            "objective_last": losses[-1],
            readable.key: {"title": readable.title, "first": values[0], "last": values[-1]},
            **self._lengths(),
            "checkpoint": None,
            "next_command": None,
        }
        file = self.folder.path / (BEST if self.loaded == BEST else FINAL)
        if file.is_file() and not self.disable_checkpointing:  # it may be an earlier run's
            tuned = tuned_run(name, self.common.target_trainer, self.dataset_json)
            content |= {"checkpoint": str(file), "next_command": tuned.command(file), "replaces": tuned.replaces()}
            recipe, _ = OCCASIONS[self.method.backbone.is_transformer]
            lengths = content.get("weight_lengths", {"restored": True})
            content["recipe_commands"] = recipe_commands(tuned, recipe, file, longer=not lengths["restored"])
        write_json(content, self.folder.path / "pretraining_summary.json")
        learned_from = self.checked.samples.summary(self.checked.training_cases)
        self.print_to_log_file(summary_text(content, readable, learned_from), add_timestamp=False)

    def out_of_memory_advice(self) -> str:
        plan = self.plans_manager.plans, self.configuration_name, self.dataset_json
        return pretraining_advice(self.method_class, self.checked, *plan, self.device)

    def _identity(self) -> dict[str, Any]:
        architecture = self.configuration_manager.configuration["architecture"]
        name = self.run_name
        return state.identity(
            self.method_class, self.checked, name.dataset, name.configuration, self.fold, architecture
        )

    def _lengths(self) -> dict[str, Any]:
        """Return the trained lengths of normed convolutions as multiples of the initial ones."""
        factors = length_factors(self.method.exported, self.initial_lengths)
        ratios = [1 / factor for factor in factors.values() if factor]
        if not ratios:
            return {}
        restored = self.common.restore_weight_lengths
        return {"weight_lengths": {"median": float(np.median(ratios)), "longest": max(ratios), "restored": restored}}

    def checkpoint_content(self, paths: list[Path]) -> dict[str, Any]:
        method, checked = self.method, self.checked
        weights, handed_over = state.network_weights(
            method, self.data_heads, self.initial_lengths, self.common.restore_weight_lengths
        )
        return {
            "network_weights": weights,
            **self.stock_state(),
            **self.stock_identity(),
            "trainer_name": type(self).__name__,
            "nnssl_adaptation_plan": adaptation_plan(
                method.exported,
                plans_name=self.plans_manager.plans_name,
                configuration_name=self.configuration_name,
                configuration=self.configuration_manager.configuration,
                patch_size=checked.geometry.crop_size,
                spacing=checked.geometry.spacing,
                channels=checked.geometry.channels,
                intensities=intensities_of(self.plans_manager.plans),
            ),
            "citations": [{"type": "pretraining method", "name": method.title, "apa_citations": [method.citation]}],
            "nnssl_ext": {
                **state.method_section(method, checked, self.filled),
                "identity": self._identity(),
                "counters": {
                    "step": self.step,
                    "samples": self.step * checked.batch_size,
                    "nonfinite": self.guard.skipped,
                },
                "outputs": state.stored(self.outputs),
                "initial_lengths": self.initial_lengths,
                "weight_lengths": handed_over,
            },
        }

    def restore_content(self, content: dict[str, Any], source: str) -> None:
        if not self.was_initialized:
            self.initialize()
        own = content["nnssl_ext"]
        state.refuse_other_run(own["identity"], self._identity(), source)
        state.refuse_other_data(own["data"], self.checked.samples.fingerprint(), source)
        try:
            self.method.load_state_dict(own["state"])
        except RuntimeError as error:  # torch lists every tensor
            raise UserError(
                f"{source} holds other tensors than this version makes of its plans. Continue it with the version that "
                f"began it ({own['versions']['nnssl_ext']}), or start anew without --c"
            ) from error
        self.restore_stock(content)
        self.step = own["counters"]["step"]
        if self.step:  # a validation may come before the next step: schedules are where the last one left them
            self.method.before_step((self.step - 1) / self.total_steps)
        self.guard.skipped = own["counters"]["nonfinite"]
        self.outputs = state.restored(own["outputs"], self.device)
        self.initial_lengths = own["initial_lengths"]
        self.filled = list(own["trained"])
