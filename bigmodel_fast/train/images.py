"""Training of an image classifier: settings, the loop over epochs, checkpoints, the report on the test images.

A run's folder holds config.yaml, metrics.jsonl (a line for each epoch), checkpoint/ (the last epoch's end), and at the
end model.safetensors, report.json, confusion.png and mistakes.png.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Augment, DataError, Images
from ..models import MLP, ViT, ViTConfig
from ..models.mlp import ACTIVATIONS
from ..ops import cross_entropy
from ..optim import AdamW, clip_grad_norm_, warmup_cosine
from . import checkpoint as files
from . import setup
from .classification import Classification, classify, plot_confusion, plot_mistakes
from .errors import CheckpointError, ConfigError, TrainError
from .mlp import MLPTrainer
from .signals import StopRequest

_FREE = ("out", "resume", "threads", "epochs")  # settings that may differ between a run and its resumption


@dataclass
class MLPShape:
    """Of model mlp.

    Args:
        hidden: widths of the hidden layers.
        activation: relu, sigmoid, tanh, gelu, gelu_tanh, silu or relu2.
        dropout: share of the hidden layers' outputs that training drops.
    """

    hidden: list[int] = field(default_factory=lambda: [128, 64])
    activation: str = "relu"
    dropout: float = 0.0


@dataclass
class ViTShape:
    """Of model vit.

    Args:
        patch: height and width of a patch; they divide the image.
        layers: blocks.
        heads: attention heads; they divide the width.
        width: of the residual stream.
        dropout: share that training drops of what the blocks add.
    """

    patch: int = 4
    layers: int = 6
    heads: int = 3
    width: int = 192
    dropout: float = 0.0


@dataclass
class Distortions:
    """Of the training images; they fade out over the last epochs.

    Args:
        shift: pixels, up to, in each direction.
        rotate: degrees, up to, either way.
        scale: share by which an image grows or shrinks, up to.
        elastic: pixels: standard deviation of a smooth random displacement.
        fade: epochs over which they fade to nothing.
    """

    shift: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    elastic: float = 0.0
    fade: int = 3


@dataclass
class ImageTrainConfig:
    """The run.

    Args:
        data: a folder of pictures by class, a folder of IDX files, or an .npz file. null: scikit-learn's digits.
        size: bring the pictures of a folder to size x size pixels. null: they are of one size.
        model: mlp, vit, or torchvision/NAME for one of torchvision's classifiers.
        out: folder of the run.
        epochs: passes over the training images.
        batch: images in one step.
        lr: the highest learning rate of AdamW, reached after the warm-up; a cosine leads from there to 0.
        warmup: share of all steps over which the learning rate rises.
        weight_decay: of all parameters.
        clip: bound on the norm of all gradients together (not of model mlp). 0: no clipping.
        resume: never, or auto (go on from the checkpoint in out, if there is one).
        seed: of the weights, the order of the images and their distortions.
        dtype: auto (bf16 for vit on CPUs that multiply bf16, else fp32), bf16 (float32 weights) or fp32.
        threads: CPU threads. null: as many as torch takes.
        augment: distortions of the training images.
        mlp: shape of model mlp.
        vit: shape of model vit.
    """

    data: str | None = None
    size: int | None = None
    model: str = "mlp"
    out: str = "runs/images"
    epochs: int = 10
    batch: int = 128
    lr: float = 4e-3
    warmup: float = 0.3
    weight_decay: float = 0.01
    clip: float = 1.0
    resume: str = "never"
    seed: int = 0
    dtype: str = "auto"
    threads: int | None = None
    augment: Distortions = field(default_factory=Distortions)
    mlp: MLPShape = field(default_factory=MLPShape)
    vit: ViTShape = field(default_factory=ViTShape)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ImageTrainConfig":
        """From nested dictionaries, as the command's parser gives them; keys left out have their defaults."""
        groups: dict[str, Any] = {"augment": Distortions, "mlp": MLPShape, "vit": ViTShape}
        return cls(**{key: groups[key](**value) if key in groups else value for key, value in values.items()})

    def check(self) -> None:
        """ConfigError, naming the key, for the first setting that cannot work."""
        for key, number in (
            ("epochs", self.epochs),
            ("batch", self.batch),
            ("threads", self.threads),
            ("size", self.size),
        ):
            if number is not None and number < 1:
                raise ConfigError(f"{key} must be 1 or more, got {number}")
        for key, value in (
            ("lr", self.lr),
            ("weight_decay", self.weight_decay),
            ("clip", self.clip),
            ("seed", self.seed),
        ):
            if not 0 <= value < float("inf") or (key == "lr" and value == 0):
                raise ConfigError(f"{key} must be {'more than 0' if key == 'lr' else '0 or more'}, got {value}")
        choices = {"dtype": ("auto", "bf16", "fp32"), "resume": ("never", "auto"), "mlp.activation": ACTIVATIONS}
        for key, allowed in choices.items():
            chosen = self.mlp.activation if key == "mlp.activation" else getattr(self, key)
            if chosen not in allowed:
                raise ConfigError(f"{key} must be one of {', '.join(allowed)}, got {chosen}")
        if self.model not in ("mlp", "vit") and not self.model.startswith("torchvision/"):
            raise ConfigError(f"model must be mlp, vit or torchvision/NAME, got {self.model}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup must lie in [0, 1), got {self.warmup}")
        if any(width < 1 for width in self.mlp.hidden):
            raise ConfigError(f"mlp.hidden must be positive widths, got {self.mlp.hidden}")
        try:
            self.distortions()
        except ValueError as error:
            raise ConfigError(str(error).replace("Augment: ", "augment.")) from None

    def distortions(self) -> Augment:
        a = self.augment
        return Augment(shift=a.shift, rotate=a.rotate, scale=a.scale, elastic=a.elastic)


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
    import torchvision

    name = config.model.removeprefix("torchvision/")
    try:
        return torchvision.models.get_model(name, weights=None, num_classes=classes)
    except (ValueError, TypeError):
        raise ConfigError(
            f"model: torchvision has no classifier {name!r}; it has resnet18, mobilenet_v3_small, ..."
        ) from None


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
        setup.open_folder(self.out)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.train, self.test = (Images.load(config.data, split, size=config.size) for split in ("train", "test"))
        if self.train.pixels.shape[1:] != self.test.pixels.shape[1:] or len(self.test.classes) > len(
            self.train.classes
        ):
            raise DataError(f"--data {config.data}: the images or classes of train and test differ")
        torch.manual_seed(config.seed)
        self.model = make_model(config, self.train)
        self.optimizer = AdamW(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        if config.dtype == "auto":
            self.dtype = setup.pick_dtype("auto", torch.device("cpu")) if config.model == "vit" else "fp32"
        else:
            self.dtype = config.dtype
        self.loader = self.train.loader(config.batch, shuffle=True)
        self.epoch = self._resume()
        steps, per_epoch = config.epochs * len(self.loader), len(self.loader)
        warmup = int(config.warmup * steps)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = config.lr
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: warmup_cosine(min(step, steps - 1), steps, warmup, 0.0),
            last_epoch=self.epoch * per_epoch - 1,
        )
        (self.out / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))

    def run(self, report: Callable[[EpochEnd], Any] = lambda end: None) -> bool:
        """Trains until the last epoch, saving after each; False if a signal came first (the epoch at hand is lost).

        Raises:
            TrainError: the loss is not finite any more, or something cannot be written.
        """
        try:
            with StopRequest() as stop:
                while self.epoch < self.config.epochs:
                    started = time.perf_counter()
                    trained = self._train_epoch(stop)
                    if trained is None:
                        return False
                    if not trained[0] < float("inf"):
                        raise TrainError(f"epoch {self.epoch + 1}: the loss is {trained[0]}; try a lower lr")
                    seconds = time.perf_counter() - started
                    self.epoch += 1
                    logits = self.predict(self.test)
                    test_loss = torch.nn.functional.cross_entropy(logits, self.test.labels).item()
                    right = (logits.argmax(1) == self.test.labels).float().mean().item()
                    end = EpochEnd(self.epoch, *trained, test_loss, right, seconds)
                    self._save(end)
                    report(end)
        except OSError as error:
            raise TrainError(f"epoch {self.epoch}: cannot write to {self.out} ({error.strerror or error})") from error
        return True

    def _train_epoch(self, stop: StopRequest) -> tuple[float, float] | None:
        """Mean loss and accuracy; None if a signal came."""
        config = self.config
        fade = (config.epochs - 1 - self.epoch) / config.augment.fade if config.augment.fade else 1.0
        self.loader.augment = config.distortions().times(min(1.0, fade))
        self.model.train()
        if config.model == "mlp":
            return self._train_native(stop)
        loss_sum, right = 0.0, 0
        for images, labels in self.loader:
            if stop.requested:
                return None
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16"):
                logits = self.model(self._channels(images))
            loss = cross_entropy(logits.float(), labels)
            loss.backward()
            if config.clip:
                clip_grad_norm_(self.model.parameters(), config.clip)
            self.optimizer.step()
            self.schedule.step()
            loss_sum += loss.item() * len(labels)
            right += int((logits.argmax(1) == labels).sum())
        return loss_sum / len(self.train), right / len(self.train)

    def _train_native(self, stop: StopRequest) -> tuple[float, float] | None:
        class Stopped(Exception):
            pass

        def look(_: Any) -> None:
            if stop.requested:
                raise Stopped

        trainer = MLPTrainer(self.model, "cross_entropy", self.optimizer, dtype=self.dtype)
        try:
            done = trainer.epoch(self.loader, scheduler=self.schedule, progress=look)
        except Stopped:
            return None
        return done.loss, done.accuracy or 0.0

    def _channels(self, images: Tensor) -> Tensor:
        grey = images.shape[1] == 1 and self.config.model.startswith("torchvision/")
        return images.expand(-1, 3, -1, -1) if grey else images

    @torch.no_grad()
    def predict(self, images: Images) -> Tensor:
        """Logits [N, classes] in float32, of the model in evaluation mode."""
        self.model.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16" and self.config.model != "mlp"):
            return torch.cat([self.model(self._channels(x)).float() for x, _ in images.loader(256)])

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

    def _resume(self) -> int:
        """Epochs done before this run; a run that is there is never overwritten."""
        place = self.out / "checkpoint"
        if self.config.resume == "never":
            if place.exists():
                raise ConfigError(
                    f"out: {self.out} holds a run already; go on with --resume auto, or choose another --out"
                )
            return 0
        if not place.exists():
            return 0
        try:
            state = json.loads((place / files.STATE).read_text(encoding="utf-8"))
            before, epoch, random = state["config"], int(state["epoch"]), state["random"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{place}: damaged ({files.STATE}: {error})") from None
        mine = dataclasses.asdict(self.config)
        for key in mine:
            if key not in _FREE and before.get(key) != mine[key]:
                raise CheckpointError(
                    f"{place}: of another run ({key} is {before.get(key)} there and {mine[key]} here)"
                )
        files.Checkpoint(place, state).restore(self.model, self.optimizer)
        setup.set_random_state(random, torch.device("cpu"))
        return epoch

    def _save(self, end: EpochEnd) -> None:
        place, unfinished = self.out / "checkpoint", self.out / "checkpoint.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        files.write_tensors(self.model, self.optimizer, unfinished)
        random = setup.random_state(torch.device("cpu"))
        state = {"epoch": end.epoch, "random": random, "config": dataclasses.asdict(self.config)}
        (unfinished / files.STATE).write_text(json.dumps(state), encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        unfinished.rename(place)
        log = self.out / "metrics.jsonl"
        kept = log.read_text(encoding="utf-8").splitlines()[: end.epoch - 1] if log.exists() else []
        log.write_text("\n".join([*kept, json.dumps(dataclasses.asdict(end))]) + "\n", encoding="utf-8")
