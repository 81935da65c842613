"""All settings of a run of image training."""

from dataclasses import dataclass, field
from typing import Any

from ..data import Augment
from ..models.mlp import ACTIVATIONS
from .errors import ConfigError
from .settings import nested


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
        model: mlp, vit, or torchvision/NAME for one of torchvision's classifiers, accelerated where parts are known.
        out: folder of the run.
        epochs: passes over the training images.
        batch: images in one step.
        lr: the highest learning rate of AdamW, reached after the warm-up; a cosine leads from there to 0.
        warmup: share of all steps over which the learning rate rises.
        weight_decay: of all parameters.
        clip: bound on the norm of all gradients together (not of model mlp). 0: no clipping.
        resume: never, or auto (go on from the checkpoint in out, if there is one).
        seed: of the weights, the order of the images and their distortions.
        device: auto (CUDA if there is some), cpu or cuda.
        dtype: auto (bf16 on CUDA, and for vit on CPUs that multiply bf16; else fp32), bf16 (float32 weights) or fp32.
        compile: run the model through torch.compile (not model mlp on the CPU, which needs none).
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
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    threads: int | None = None
    augment: Distortions = field(default_factory=Distortions)
    mlp: MLPShape = field(default_factory=MLPShape)
    vit: ViTShape = field(default_factory=ViTShape)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ImageTrainConfig":
        """From nested dictionaries, as the command's parser gives them; keys left out have their defaults."""
        return nested(cls, values)

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
            ("augment.fade", self.augment.fade),
        ):
            if not 0 <= value < float("inf") or (key == "lr" and value == 0):
                raise ConfigError(f"{key} must be {'more than 0' if key == 'lr' else '0 or more'}, got {value}")
        choices = {"device": ("auto", "cpu", "cuda"), "dtype": ("auto", "bf16", "fp32"), "resume": ("never", "auto")}
        choices |= {"mlp.activation": ACTIVATIONS}
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
