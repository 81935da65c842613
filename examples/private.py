"""Training with differential privacy: DP-SGD (Abadi et al. 2016) by opacus, on this package's modules.

    pip install 'bigmodel_fast[privacy,vision]'
    python examples/private.py [--epsilon 8] [--delta 1e-4] [--epochs 30] [--clip 1] [--data FOLDER]

A small Transformer learns scikit-learn's handwritten digits (or another folder of images, as bigmodel_fast.data.Images
reads it) twice: as usual, and so that the weights tell next to nothing of any one image. Opacus clips the gradient of
each sample and adds noise; how much it may spend, epsilon at delta, is given, and what was spent is reported.

What is special is the gradient of each sample, of which ordinary training makes the sum only. Opacus is told here how
to make those of bigmodel_fast.nn's Linear, LayerNorm and RMSNorm, and GatedMLP calls its layers one by one where opacus
watches them. Weights that are used without a module's forward (models.GPT's tied table) have no such rule.
"""

import argparse

import torch
from opacus import PrivacyEngine
from opacus.grad_sample import register_grad_sampler
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bigmodel_fast import nn, ops
from bigmodel_fast.data import Images
from bigmodel_fast.optim import AdamW

Gradients = dict[torch.nn.Parameter, Tensor]  # of each sample: [batch, *parameter.shape]


# ---- gradients of each sample, for opacus ----


@register_grad_sampler(nn.Linear)
def linear_gradients(layer: nn.Linear, inputs: list[Tensor], grad: Tensor) -> Gradients:
    """dW = sum over a sample's rows of g x^T, where g is the gradient before the activation; db = sum of g."""
    x = inputs[0]
    if layer.activation is not None:
        pre = ops.linear(x, layer.weight, layer.bias).detach().requires_grad_()
        with torch.enable_grad():
            y = _activation(layer.activation)(pre)
        (grad,) = torch.autograd.grad(y, pre, grad)
    x, grad = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, grad))
    found = {layer.weight: torch.einsum("bro,bri->boi", grad, x)}
    if layer.bias is not None:
        found[layer.bias] = grad.sum(1)
    return found


@register_grad_sampler([nn.LayerNorm, nn.RMSNorm])
def norm_gradients(layer: nn.LayerNorm | nn.RMSNorm, inputs: list[Tensor], grad: Tensor) -> Gradients:
    """dw = sum over a sample's rows of g times what was normed (with its residual); db = sum of g."""
    s = sum(inputs[1:], inputs[0])
    if isinstance(layer, nn.LayerNorm):
        normed = ops.layer_norm(s, None, None, eps=layer.eps)
    else:
        eps = torch.finfo(s.dtype).eps if layer.eps is None else layer.eps
        normed = ops.rms_norm(s, torch.ones_like(layer.weight), eps=eps)
    rows = (len(s), -1, s.shape[-1])
    found = {layer.weight: (grad * normed).reshape(rows).sum(1)}
    if getattr(layer, "bias", None) is not None:
        found[layer.bias] = grad.reshape(rows).sum(1)
    return found


def _activation(name: str):
    """As nn.Linear's: by the package's own reference, so that nothing is defined twice."""
    from bigmodel_fast.ops._activation import activate

    return lambda x: activate(x, name)


# ---- the model and its training ----


class Block(torch.nn.Module):
    """Attention and a gated MLP, each after a norm of the residual stream."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.GatedMLP(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = ops.attention(q, k, v).transpose(1, 2).reshape(b, s, w)
        normed, x = self.norm2(self.out(y), x)
        return x + self.mlp(normed)


class Classifier(torch.nn.Module):
    """A Transformer over the rows of an image."""

    def __init__(self, channels: int, height: int, width: int, classes: int, *, features: int = 64, layers: int = 2):
        super().__init__()
        self.rows = nn.Linear(channels * width, features, activation="gelu_tanh")
        places = torch.arange(height)[:, None] / 10 ** torch.linspace(0, 2, features // 2)
        self.places = torch.cat([places.sin(), places.cos()], 1)  # no parameter, and no buffer that opacus would refuse
        self.blocks = torch.nn.Sequential(*(Block(features, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, classes]."""
        x = self.rows(images.permute(0, 2, 1, 3).flatten(2)) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


def digits(split: str, source: str | None = None) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] of "train" or "test" in [-1, 1], and their labels."""
    images = Images.load(source, split=split)
    return images.pixels.float() / 127.5 - 1, images.labels


def learn(model, loader, optimizer, epochs: int, tell=lambda epoch: None) -> None:
    model.train()
    for epoch in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            if len(labels):  # Poisson sampling may draw no one
                ops.cross_entropy(model(images), labels).backward()
                optimizer.step()
        tell(epoch + 1)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = (model(images).argmax(1) == labels).float().mean().item()
    model.train()
    return right


def make_private(model, optimizer, loader, *, epsilon: float, delta: float, epochs: int, clip: float):
    """(engine, model, optimizer, loader) that spend `epsilon` at `delta` in `epochs`."""
    engine = PrivacyEngine(accountant="rdp")
    made = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=epsilon,
        target_delta=delta,
        epochs=epochs,
        max_grad_norm=clip,
    )
    return engine, *made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="images, as bigmodel_fast.data.Images reads them (default: the digits)")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--clip", type=float, default=1.0, help="bound on the norm of each sample's gradient")
    parser.add_argument("--lr", type=float, default=3e-3)
    arguments = parser.parse_args(argv)
    images, labels = digits("train", arguments.data)
    loader = DataLoader(TensorDataset(images, labels), arguments.batch, shuffle=True)
    for private in (False, True):
        torch.manual_seed(0)
        model = Classifier(*images.shape[1:], int(labels.max()) + 1)
        optimizer = AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.0)
        if private:
            budget = {key: getattr(arguments, key) for key in ("epsilon", "delta", "epochs", "clip")}
            engine, model, optimizer, loader = make_private(model, optimizer, loader, **budget)
        learn(model, loader, optimizer, arguments.epochs)
        spent = f"epsilon {engine.get_epsilon(arguments.delta):.2f} at delta {arguments.delta:g}" if private else "none"
        print(f"privacy: {spent}; test accuracy {accuracy(model, *digits('test', arguments.data)):.2%}", flush=True)


if __name__ == "__main__":
    main()
