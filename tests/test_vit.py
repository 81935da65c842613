"""ViT: torchvision's outputs and gradients with its weights, and errors."""

import pytest
import torch

from bigmodel_fast.models import ViT, ViTConfig


@pytest.mark.parametrize("autocast", [False, True])
def test_it_is_torchvisions_with_the_same_weights(autocast: bool) -> None:
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(16, 4, 2, 2, 32, 64, num_classes=5)
    mine = ViT(ViTConfig(classes=5, image=16, patch=4, layers=2, heads=2, width=32, mlp_width=64))
    torch.nn.init.normal_(theirs.heads.head.weight)
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    images = torch.randn(3, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        a, b = mine(images), theirs(images)
    close = {"rtol": 0.05, "atol": 0.05} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(a.float(), b.float(), **close)
    for y in (a, b):
        y.float().square().sum().backward()
    exact = dict(theirs.named_parameters())
    for name, p in mine.named_parameters():
        q = exact[name]
        scale = q.grad.abs().max().item()
        assert (p.grad - q.grad).abs().max().item() <= (0.1 if autocast else 1e-4) * scale + 1e-6, name


def test_a_vit_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="image must be a multiple of patch, got 30 and 4"):
        ViTConfig(image=30)
    with pytest.raises(ValueError, match="width must be a multiple of heads"):
        ViTConfig(width=100)
    model = ViT(ViTConfig(layers=1, image=8, channels=1))
    with pytest.raises(ValueError, match=r"images must be \[B, 1, 8, 8\], got \[2, 3, 8, 8\]"):
        model(torch.zeros(2, 3, 8, 8))
