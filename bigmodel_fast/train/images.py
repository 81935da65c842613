"""Training of an image classifier: settings, the loop over epochs, checkpoints, the report on the test images.

A run's folder holds config.yaml, metrics.jsonl (a line for each epoch), checkpoints (an epoch's end, or wherever a
signal came), and at the end model.safetensors, report.json, confusion.png and mistakes.png.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._accelerate import accelerate
from .._machine import cannot_compile
from ..data import DataError, Images
from ..models import MLP, ViT, ViTConfig
from ..optim import AdamW, clip_grad_norm_, warmup_cosine
from . import checkpoint as files
from . import durable, setup, torchvision_models
from .classification import Classification, classify, plot_confusion, plot_mistakes
from .errors import CheckpointError, ConfigError, TrainError, is_out_of_memory
from .guard import told
from .image_config import ImageTrainConfig
from .lock import RunLock
from .mlp import EpochResult, MLPTrainer
from .passes import Ahead
from .signals import StopRequest

_FREE = ("out", "resume", "threads", "epochs", "device")  # settings that may differ between a run and its resumption
SAVE_SECONDS = 300.0  # between two checkpoints in mid-epoch

RandomState = dict[str, str]  # of setup.random_state


@dataclass(frozen=True)
class EpochEnd:
    """What one epoch came to, as metrics.jsonl has it."""

    epoch: int
    loss: float
    accuracy: float  # of the training images, when it was their turn
    test_loss: float
    test_accuracy: float
    seconds: float


def make_model(config: ImageTrainConfig, images: Images) -> torch.nn.Module:
    """The model for images of this shape; ConfigError for a shape that it cannot have."""
    _, channels, height, width = images.pixels.shape
    classes = len(images.classes)
    try:
        if config.model == "mlp":
            m = config.mlp
            sizes = [channels * height * width, *m.hidden, classes]
            return MLP(sizes, activation=m.activation, dropout=m.dropout)
        if config.model == "vit":
            if height != width:
                raise ConfigError(f"model: vit needs square images, these are {width}x{height}; give a size")
            return ViT(ViTConfig(classes, height, channels=channels, **dataclasses.asdict(config.vit)))
    except ValueError as error:
        raise ConfigError(str(error).replace("ViTConfig: ", "vit.").replace("MLP: ", "mlp.")) from None
    last = len(images) % config.batch or config.batch
    return torchvision_models.make(config.model, classes, height, width, {min(config.batch, len(images)), last})


class ImageTrainer:
    """A run with all its parts in place: the constructor checks, loads and resumes, `run` trains.

    Raises:
        ConfigError, DataError, CheckpointError: something that cannot work, before any of it is done.
    """

    def __init__(self, config: ImageTrainConfig):
        config.check()
        import sklearn.metrics  # noqa: F401  (missing packages are an error now, not after the training)
        import yaml
        from safetensors import torch as _  # noqa: F401

        self.config, self.out = config, Path(config.out).expanduser()
        self.device = setup.pick_device(config.device)
        if config.compile and (reason := cannot_compile(self.device.type)):
            raise ConfigError(f"compile: {reason}")
        made = setup.open_folder(self.out)
        self._lock = RunLock(self.out)
        try:
            self._prepare()
        except BaseException:
            self._lock.release()
            setup.remove_empty(made)
            raise
        (self.out / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))

    def _prepare(self) -> None:
        config = self.config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.train, self.test = (Images.load(config.data, split, size=config.size) for split in ("train", "test"))
        if self.train.pixels.shape[1:] != self.test.pixels.shape[1:] or len(self.test.classes) > len(
            self.train.classes
        ):
            raise DataError(f"--data {config.data}: the images or classes of train and test differ")
        torch.manual_seed(config.seed)
        try:
            self.model = make_model(config, self.train).to(self.device)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise TrainError("out of memory for the model itself; take a smaller one") from None
            raise
        self.accelerated = accelerate(self.model) if self._from_torchvision else None
        self._native = config.model == "mlp" and self.device.type == "cpu"
        self._forward = torch.compile(self.model) if config.compile else self.model
        self.optimizer = AdamW(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.dtype = setup.pick_dtype(config.dtype, self.device)
        if config.dtype == "auto" and self.device.type == "cpu" and config.model != "vit":
            self.dtype = "fp32"
        self.loader = self.train.loader(config.batch, shuffle=True)
        self.epoch = 0
        self._began: RandomState | None = None  # random numbers when the epoch at hand began
        self._done = EpochResult(0, len(self.loader), 0.0, 0.0, 0.0)  # of the epoch at hand
        self._resume()
        steps = config.epochs * len(self.loader)
        warmup = int(config.warmup * steps)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = config.lr
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: warmup_cosine(min(step, steps - 1), steps, warmup, 0.0),
            last_epoch=self.step - 1,
        )

    @property
    def step(self) -> int:
        """Steps done, of all epochs."""
        return self.epoch * len(self.loader) + self._done.steps

    def run(self, report: Callable[[EpochEnd], Any] = lambda end: None) -> bool:
        """Trains until the last epoch, saving after each; False if a signal came first, and the run can be resumed.

        Raises:
            TrainError: the loss is not finite any more, or something cannot be written.
        """
        try:
            with told(self.out, self._where, self._advice, lambda: ""), StopRequest() as stop:
                while self.epoch < self.config.epochs:
                    if stop.requested:
                        return False
                    self._train_epoch(stop)
                    if self._done.steps < self._done.total:
                        self._save()
                        return False
                    if not self._done.loss < float("inf"):
                        raise TrainError(f"epoch {self.epoch + 1}: the loss is {self._done.loss}; try a lower lr")
                    self._end_epoch(report)
        finally:
            self._lock.release()
        return True

    def _where(self) -> str:
        return f"epoch {self.epoch}"

    def _advice(self) -> str:
        return f"out of memory with {self.config.batch} images a step; lower --batch, or take a smaller model"

    def _end_epoch(self, report: Callable[[EpochEnd], Any]) -> None:
        done = self._done
        self.epoch, self._began = self.epoch + 1, None
        self._done = EpochResult(0, len(self.loader), 0.0, 0.0, 0.0)
        logits = self.predict(self.test)
        test_loss = torch.nn.functional.cross_entropy(logits, self.test.labels).item()
        right = (logits.argmax(1) == self.test.labels).float().mean().item()
        end = EpochEnd(self.epoch, done.loss, done.accuracy or 0.0, test_loss, right, done.seconds)
        self._save()
        log = self.out / "metrics.jsonl"
        kept = log.read_text(encoding="utf-8").splitlines()[: end.epoch - 1] if log.exists() else []
        durable.write_text(log, "\n".join([*kept, json.dumps(dataclasses.asdict(end))]) + "\n")
        report(end)

    def _train_epoch(self, stop: StopRequest) -> None:
        """Goes on to the end of the epoch at hand, or until a signal comes; `_done` says how far it came."""
        config = self.config
        fade = (config.epochs - 1 - self.epoch) / config.augment.fade if config.augment.fade else 1.0
        self.loader.augment = config.distortions().times(min(1.0, fade))
        self.model.train()
        resumed, self._saved = setup.random_state(self.device), time.monotonic()
        if self._began is None:
            self._began = resumed
        else:  # the epoch's order and distortions are drawn as when it began
            setup.set_random_state(self._began, self.device)
        if self._native:
            self._train_native(stop)
            return
        order, seed = self.loader.order(), self.loader.draw_seed()
        if self._done.steps:
            setup.set_random_state(resumed, self.device)
        batches = list(enumerate(order.split(config.batch)))[self._done.steps :]
        feed = Ahead(((self.loader.inputs(b, seed, step), self.train.labels[b]) for step, b in batches), self.device)
        for images, labels in feed:
            if stop.requested:
                return
            self._train_step(images, labels, feed.look_ahead)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16" and not self._native)

    def _train_step(self, images: Tensor, labels: Tensor, look_ahead: Callable[[], None]) -> None:
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            output = self._forward(self._channels(images))
        loss, logits = torchvision_models.losses(self.config.model, output, labels)
        loss.backward()
        if self.config.clip:
            clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.schedule.step()
        look_ahead()
        done, new = self._done, len(labels)
        seen = done.steps * self.config.batch
        new_loss, new_right = torch.stack([loss.detach(), (logits.argmax(1) == labels).sum()]).tolist()  # waits once
        loss_sum = done.loss * seen + new_loss * new
        right = round((done.accuracy or 0.0) * seen) + round(new_right)
        seconds = done.seconds + time.perf_counter() - started
        self._went_on(EpochResult(done.steps + 1, done.total, loss_sum / (seen + new), right / (seen + new), seconds))

    def _train_native(self, stop: StopRequest) -> None:
        class Stopped(Exception):
            pass

        def look(done: EpochResult) -> None:
            self._went_on(done)
            if stop.requested and done.steps < done.total:
                raise Stopped

        trainer = MLPTrainer(self.model, "cross_entropy", self.optimizer, dtype=self.dtype)
        with contextlib.suppress(Stopped):
            trainer.epoch(self.loader, scheduler=self.schedule, progress=look, resume=self._done)

    def _went_on(self, done: EpochResult) -> None:
        self._done = done
        if done.steps < done.total and done.loss < math.inf and time.monotonic() - self._saved > SAVE_SECONDS:
            self._save()

    def _channels(self, images: Tensor) -> Tensor:
        grey = images.shape[1] == 1 and self._from_torchvision
        return images.expand(-1, 3, -1, -1) if grey else images

    @property
    def _from_torchvision(self) -> bool:
        return self.config.model.startswith(torchvision_models.PREFIX)

    @torch.no_grad()
    def predict(self, images: Images) -> Tensor:
        """Logits [N, classes] in float32, on the CPU, of the model in evaluation mode."""
        self.model.eval()
        batches = images.loader(self.config.batch if self._from_torchvision else 256)
        with self._autocast():
            found = [self.model(self._channels(x.to(self.device))).float() for x, _ in batches]
        return torch.cat(found).cpu()

    def report(self) -> tuple[Classification, int]:
        """Judges the model on the test images; writes weights, figures and pictures to the run's folder.

        Returns:
            The figures, and how many images were missed.
        """
        logits = self.predict(self.test)
        found = classify(logits.argmax(1), self.test.labels, self.train.classes)
        files.write_model(self.model, self.out / files.MODEL)
        (self.out / "report.json").write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n", encoding="utf-8")
        plot_confusion(found, self.out / "confusion.png")
        shown = dataclasses.replace(self.test, classes=self.train.classes)
        return found, plot_mistakes(shown, logits, self.out / "mistakes.png")

    # ---- checkpoints ----

    def _resume(self) -> None:
        """Takes up the newest good checkpoint, if that is wanted; a run that is there is never overwritten."""
        config = self.config
        if config.resume == "never":
            if files.checkpoint_folders(self.out):
                raise ConfigError(
                    f"out: {self.out} holds a run already; go on with --resume auto, or choose another --out"
                )
            return
        checkpoint, damage = files.newest_checkpoint(self.out)
        if checkpoint is None:
            if damage:
                raise CheckpointError(damage[0])
            return
        mine = dataclasses.asdict(config)
        try:
            state = checkpoint.state
            before, done = state["config"], EpochResult(total=len(self.loader), **state["done"])
            for key in mine:
                if key not in _FREE and before.get(key) != mine[key]:
                    raise CheckpointError(
                        f"{checkpoint.path}: of another run ({key} is {before.get(key)} there and {mine[key]} here)"
                    )
            checkpoint.restore(self.model, self.optimizer)
            setup.set_random_state(state["random"], self.device)
            self.epoch, self._done = checkpoint.step // len(self.loader), done
            self._began = state["began"] if done.steps else None
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{checkpoint.path}: damaged ({files.STATE}: {error})") from None

    def _save(self) -> None:
        done = {key: value for key, value in dataclasses.asdict(self._done).items() if key != "total"}
        files.save_checkpoint(
            self.out / "checkpoints",
            step=self.step,
            model=self.model,
            optimizer=self.optimizer,
            tokenizer=None,
            state={
                "model": self.config.model,
                "config": dataclasses.asdict(self.config),
                "done": done,
                "began": self._began,
                "random": setup.random_state(self.device),
            },
        )
        self._saved = time.monotonic()
