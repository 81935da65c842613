"""torchvision's classifiers for train-image: made for images of a shape, tried before the run, their loss.

Shapes: B images; C channels, 3 to the model, H x W pixels.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..ops import cross_entropy
from .errors import ConfigError

PREFIX = "torchvision/"
# Auxiliary heads help lower layers learn, and count less: by 0.3 in GoogLeNet (Szegedy et al. 2015), by 0.4 in
# Inception v3, as torchvision's was trained.
_AUXILIARY = {"googlenet": 0.3, "inception_v3": 0.4}


def make(model: str, classes: int, height: int, width: int, batches: Iterable[int]) -> torch.nn.Module:
    """The classifier torchvision/NAME with random weights from torch's global generator.

    Raises:
        ConfigError: there is none of that name, or it cannot be trained on batches of these sizes of such images.
    """
    import torchvision

    name = model.removeprefix(PREFIX)
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ConfigError(f"model: torchvision has no classifier {name!r}; it has resnet18, mobilenet_v3_small, ...")
    how: dict[str, Any] = {"init_weights": True} if name in _AUXILIARY else {}
    if name.startswith("vit_"):
        if height != width:
            raise ConfigError(f"model: {name} needs square images, these are {width}x{height}; give a size")
        how["image_size"] = height
    try:
        with torch.device("meta"):  # shapes alone
            tried = torchvision.models.get_model(name, weights=None, num_classes=classes, **how).train()
            for batch in sorted(set(batches), reverse=True):
                tried(torch.empty(batch, 3, height, width))
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        if "more than 1 value per channel" in reason:
            raise ConfigError(
                f"batch: {name} normalises over the batch, and an epoch has a batch of one image; choose another batch"
            ) from None
        raise ConfigError(
            f"size: {name} cannot be trained on images of {width}x{height} ({reason}); give another size"
        ) from None
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **how)


def losses(model: str, output: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss to train by, with that of auxiliary heads, and the logits [B, classes]."""
    logits, *others = (output,) if isinstance(output, Tensor) else output
    loss = cross_entropy(logits.float(), labels)
    for auxiliary in others:
        if auxiliary is not None:
            loss = loss + _AUXILIARY[model.removeprefix(PREFIX)] * cross_entropy(auxiliary.float(), labels)
    return loss, logits
