"""Do what both scripts do before, between and after their optimization steps, which they write out."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from accelerate.logging import get_logger
from accelerate.utils import KwargsHandler
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import as_run_error, one_line
from . import checkpoints, hub, latents, lora, optimization, preflight, prior, resumable, run_config, setup, trackers
from .base import open_base
from .checkpoints import Checkpoints, Stateful
from .data import DreamBoothDataset, SDXLDreamBoothDataset
from .images import PhotoTransform
from .interruption import GracefulExit
from .models import loading_errors
from .photos import find_photos

logger = get_logger(__name__)
Hook = Callable[[str], None]  # writes or reads the models of a checkpoint in a folder
Validate = Callable[[int], list[Image.Image]]  # from the number of updates to images, empty where there are none


class Regularizer(Stateful, Protocol):
    """What the loop asks of the penalty."""

    @property
    def logs(self) -> dict[str, float]: ...
    @property
    def card_metadata(self) -> dict[str, str]: ...
    def after_step(self, global_step: int) -> None: ...
    def finish(self) -> None: ...


class TrainableModels:
    """The models of a run, as attributes."""

    trainable_names: list[str]  # of those that are trained, whole or by adapters
    unwrapped: dict[str, nn.Module]  # the trained models by name, as they are before accelerate prepares them
    vae: Any  # `None` for a pipeline that diffuses pixels
    lora_pipeline: type[DiffusionPipeline]  # knows how adapters to these models are saved

    @property
    def trainable(self) -> dict[str, nn.Module]:
        """Return the trained models by name, as accelerate has prepared them."""
        return {name: getattr(self, name) for name in self.trainable_names}

    @property
    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the trained weights."""
        return [p for model in self.trainable.values() for p in model.parameters() if p.requires_grad]


class TrainingRun:
    """Check what can be checked without a model, and do all that both scripts do around their optimization steps.

    Call `prepare`, then `start`; make a step for each of `batches`, each followed by `after_batch`; then `save` and `publish`.
    `prepare` writes to `args`: it fills in the numbers of steps and epochs, and applies `--scale_lr`.
    """

    def __init__(self, args: Namespace, graceful_exit: GracefulExit, *handlers: KwargsHandler, sdxl: bool) -> None:
        self.args = args
        self.graceful_exit = graceful_exit
        self.accelerator = setup.start_accelerator(args, *handlers)
        self.photos = find_photos(args)
        self.base = open_base(args, self.accelerator, sdxl)
        self.output, self.checkpoint, self.repo_id = preflight.open_output(args, self.accelerator, self.base)
        self.config = run_config.start(args, self.base, self.checkpoint)
        with loading_errors(args):
            self.class_images = prior.ensure_class_images(args, self.accelerator, self.base)
        options = {"interpolation": args.image_interpolation_mode, "random_flip": args.random_flip} if sdxl else {}
        self.transform = PhotoTransform(args.resolution, args.center_crop, **options)
        if sdxl:  # photos are cropped once in any case
            number, cropped = len(self.photos) * args.repeats, self.class_images
        else:
            paths = [photo.path for photo in self.photos if photo.path is not None]
            number, cropped = len(paths), paths + self.class_images
        self.caches_latents = latents.should_cache_latents(
            args, number + len(self.class_images), cropped, self.transform, "vae" in self.base.classes
        )
        self.global_step = 0
        self.images: list[Image.Image] = []  # of the last validation, on the main process

    def prepare(self, models: TrainableModels, dataset: DreamBoothDataset | SDXLDreamBoothDataset) -> None:
        """Create loader, optimizer and schedule, and have accelerate prepare them with the models."""
        args, accelerator, self.models = self.args, self.accelerator, models
        memory_formats = latents.cache_latents(args, accelerator, models.vae, dataset) if self.caches_latents else None
        loader = resumable.make_loader(args, dataset, memory_formats)
        num_batches = math.ceil(len(loader) / accelerator.num_processes)
        self.num_update_steps_per_epoch = optimization.plan_steps(args, num_batches)
        optimization.scale_learning_rate(args, accelerator.num_processes)
        optimizer = optimization.create_optimizer(args, models.trainable, setup.can_fuse_adamw(accelerator))
        preflight.check_disk(args, models.trainable_parameters)
        lr_scheduler = optimization.create_lr_scheduler(args, optimizer, accelerator.num_processes)
        if args.rank is None:
            save: Hook = partial(checkpoints.save_models, models.unwrapped)
            load: Hook = partial(checkpoints.load_models, models.unwrapped)
        else:
            save = partial(lora.save_checkpoint, models.lora_pipeline, models.unwrapped, lora.scale(args))
            load = partial(lora.load_adapters, models.unwrapped)
        checkpoints.register_hooks(accelerator, save, load)
        names = models.trainable_names
        prepared = accelerator.prepare(*models.trainable.values(), optimizer, loader, lr_scheduler)
        for name, model in zip(names, prepared, strict=False):
            setattr(models, name, model)
        self.optimizer, self.loader, self.lr_scheduler = prepared[len(names) :]
        self.parameters = models.trainable_parameters  # FSDP divides the weights, so these are others than before
        self.checkpoints = Checkpoints(args, accelerator, self.output, self.config, self.loader, self.lr_scheduler)

    def start(self, regularizer: Regularizer, project: str) -> None:
        """Load the checkpoint of `--resume_from_checkpoint`, if given; start the trackers and the progress bar."""
        self.regularizer = regularizer
        self.global_step, self.epochs = self.checkpoints.resume(
            self.checkpoint, self.num_update_steps_per_epoch, regularizer
        )
        trackers.start_trackers(self.args, self.accelerator, project)
        self.progress = tqdm(
            desc="Steps",
            initial=self.global_step,
            total=self.args.max_train_steps,
            disable=not self.accelerator.is_local_main_process,
        )

    def batches(self, validate: Validate) -> Iterator[dict[str, Any]]:
        """Yield the batches of all epochs, until the last update is made; validate between epochs, if flags say so."""
        self.graceful_exit.defer("finishing this update and writing a checkpoint")
        self.validate = validate
        validation_epochs = vars(self.args).get("validation_epochs")
        for epoch in self.epochs:
            for model in self.models.trainable.values():
                model.train()
            for batch in self.loader:
                yield batch
                if self.global_step >= self.args.max_train_steps:
                    break
            if validation_epochs is not None and epoch % validation_epochs == 0:
                self._validate(self.validate)
        self.progress.close()
        self.graceful_exit.defer("finishing the result")

    def clip_gradients(self) -> None:
        """Clip the gradients to `--max_grad_norm`; stop the run if they are not finite."""
        self.check_finite(gradient=self.accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm))

    def check_finite(self, **quantities: Tensor) -> None:
        """Stop the run if one of the scalars is not finite, before the weights are changed."""
        self.checkpoints.check_finite(self.global_step, **quantities)

    def after_batch(self, loss: Tensor) -> None:
        """Log the batch. After an update, measure, save and validate if it is time, and end the run after a signal."""
        args, stopping = self.args, False
        if self.accelerator.sync_gradients:
            self.global_step += 1
            self.progress.update(1)
            self.regularizer.after_step(self.global_step)
            interrupted = self.graceful_exit.requested(self.accelerator)
            stopping = interrupted and self.global_step < args.max_train_steps  # else the result comes next
            if stopping or self.global_step % args.checkpointing_steps == 0:
                checkpoint = self.checkpoints.save(self.global_step, self.regularizer)
            validation_steps = vars(args).get("validation_steps")
            if validation_steps is not None and self.global_step % validation_steps == 0 and not interrupted:
                self._validate(self.validate)
        logs = {"loss": loss.item(), "lr": self.lr_scheduler.get_last_lr()[0]} | self.regularizer.logs
        self.progress.set_postfix(**logs)
        self.accelerator.log(logs, step=self.global_step)
        if stopping:
            self.progress.close()
            self.graceful_exit.exit(self.accelerator, checkpoint)

    def _validate(self, validate: Validate) -> None:
        if self.args.validation_prompt is not None:
            try:
                self.images = validate(self.global_step)
            except Exception as error:  # such as too little memory: it must not end the training
                logger.warning(f"Validation failed, training goes on: {one_line(error)}")

    def save(
        self,
        save_weights: Callable[[Mapping[str, nn.Module], Path], None],
        save_rest: Callable[[Mapping[str, nn.Module], Path], dict[str, str]],
    ) -> dict[str, str]:
        """Write the result in place of an earlier one; return the model card's rows on the penalty and the result.

        `save_weights` writes what was trained, before anything else may fail; `save_rest` writes the rest of the result
        and returns further rows.
        """
        self.accelerator.wait_for_everyone()
        self.regularizer.finish()
        full_models = checkpoints.gather_full_models(self.accelerator, self.models.unwrapped)
        metadata = self.regularizer.card_metadata
        if self.accelerator.is_main_process:
            with self.checkpoints.disk_errors(self.args.output_dir):
                with self.output.result(partial(save_weights, full_models)) as folder:
                    metadata |= save_rest(full_models, folder)
        return metadata

    def publish(
        self, *, license: str, tags: list[str], card_rows: dict[str, str], validate: Validate | None = None
    ) -> None:
        """End the run: validate the result with `validate` if it is given, and upload it with `--push_to_hub`."""
        args, output, repo_id = self.args, self.output, self.repo_id
        with as_run_error(lambda error: f"{one_line(error)}. {hub.push_advice(output, repo_id)}"):
            if validate is not None and not self.graceful_exit.signal:
                self._validate(validate)
            self.accelerator.end_training()
            if repo_id is not None:
                for number, image in enumerate(self.images):
                    output.write_result(f"image_{number}.png", image.save)
                card = hub.model_card(
                    args,
                    repo_id,
                    self.images,
                    license=license,
                    tags=[*tags, *(["lipschitz-drift"] if "lipreg_reduction" in card_rows else [])],
                    penalty=card_rows,
                    commit=self.base.commit,
                )
                output.write_result("README.md", card.save)
            if self.accelerator.is_main_process:
                self.graceful_exit.at_once(hub.push_advice(output, repo_id))
            if repo_id is not None:
                hub.upload(args, output, repo_id)
