"""Multilayer perceptron: layers of activation(x W^T + b), with dropout between them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..nn.parts import plain, untouched
from ..ops._mlp_fused import mlp_fused
from ..ops.linear import hidden_linear


class ReLU2(torch.nn.Module):
    """max(0, x)^2 (So et al. 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


class _Tanh_GELU(torch.nn.GELU):
    def __init__(self) -> None:
        super().__init__(approximate="tanh")


_MODULES: dict[str, type[torch.nn.Module]] = {
    "relu": torch.nn.ReLU,
    "sigmoid": torch.nn.Sigmoid,
    "tanh": torch.nn.Tanh,
    "gelu": torch.nn.GELU,
    "gelu_tanh": _Tanh_GELU,
    "silu": torch.nn.SiLU,
    "relu2": ReLU2,
}
ACTIVATIONS = tuple(_MODULES)


@dataclass(frozen=True)
class DenseLayer:
    """One layer of an MLP as its modules say: a Linear, what follows it, and the place of the Linear in the model."""

    name: str
    linear: torch.nn.Linear
    activation: str | None
    dropout: torch.nn.Dropout | None

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] to [N, out]."""
        y = hidden_linear(x, self.linear.weight, self.linear.bias, activation=self.activation)
        return y if self.dropout is None else self.dropout(y)


class MLP(torch.nn.Sequential):
    """A torch.nn.Sequential of Linear, activation and Dropout modules, run by fused operators.

    Its state-dict keys are those of the Sequential a PyTorch user writes by hand: `Linear, ReLU, Linear, ReLU, Linear`
    has 0.weight, 0.bias, 2.weight, 2.bias, 4.weight, 4.bias; a Dropout, where there is one, follows its activation and
    counts as a module. Weights are drawn as torch.nn.Linear draws them.

    Args:
        sizes: features of the input, of each hidden layer, and of the output: [784, 128, 64, 10].
        activation: of the hidden layers: relu, sigmoid, tanh, gelu, gelu_tanh, silu or relu2; one, or one for each.
        bias: whether layers have one; one bool, or one for each layer.
        dropout: share of the hidden layers' outputs that training drops; one, or one for each.

    Raises:
        ValueError: fewer than two sizes, an unknown activation, or lists that do not fit.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: str | Sequence[str] = "relu",
        bias: bool | Sequence[bool] = True,
        dropout: float | Sequence[float] = 0.0,
    ):
        if len(sizes) < 2 or any(not isinstance(n, int) or n < 1 for n in sizes):
            raise ValueError(f"MLP: sizes must be two or more positive integers, got {list(sizes)}")
        hidden = len(sizes) - 2
        activations = _for_each("activation", activation, hidden, str)
        biases = _for_each("bias", bias, hidden + 1, bool)
        dropouts = _for_each("dropout", dropout, hidden, (int, float))
        for name in activations:
            if name not in _MODULES:
                raise ValueError(f"MLP: activation must be one of {', '.join(_MODULES)}, got {name!r}")
        for share in dropouts:
            if not 0 <= share < 1:
                raise ValueError(f"MLP: dropout must lie in [0, 1), got {share}")
        modules: list[torch.nn.Module] = []
        for i in range(hidden):
            modules += [torch.nn.Linear(sizes[i], sizes[i + 1], biases[i]), _MODULES[activations[i]]()]
            modules += [torch.nn.Dropout(dropouts[i])] if dropouts[i] else []
        super().__init__(*modules, torch.nn.Linear(sizes[-2], sizes[-1], biases[-1]))
        self.sizes = tuple(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, ...] with sizes[0] features in a sample to [N, sizes[-1]]."""
        x = x.flatten(1)
        if x.shape[1] != self.sizes[0]:
            raise ValueError(f"MLP: a sample must have {self.sizes[0]} features, got {x.shape[1]}")
        layers = _read(self)
        if isinstance(layers, str):  # a part that has to be called
            return super().forward(x)
        y = mlp_fused(
            x,
            [layer.linear.weight for layer in layers],
            [layer.linear.bias for layer in layers],
            [layer.activation for layer in layers],
            any(layer.dropout is not None and layer.dropout.training for layer in layers),
        )
        if y is not None:
            return y
        for layer in layers:
            x = layer.forward(x)
        return x


def _for_each(name: str, value, count: int, kind: type | tuple[type, ...]) -> list:
    values = [value] * count if isinstance(value, kind) else list(value)
    if len(values) != count:
        raise ValueError(f"MLP: {name} must be one value or {count}, got {len(values)}")
    return values


def _activation_name(module: torch.nn.Module) -> str | None:
    if type(module) in (torch.nn.GELU, _Tanh_GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return next((name for name, kind in _MODULES.items() if type(module) is kind), None)


def dense_layers(model: torch.nn.Module) -> list[DenseLayer]:
    """The layers of an MLP, or of any torch.nn.Sequential that is one.

    Such a Sequential may begin with Flatten and hold Linear, the activations of ACTIVATIONS, Dropout, Identity and
    Sequentials of them, none with hooks or a forward of its own.

    Raises:
        ValueError: anything else; the message names the module.
    """
    layers = _read(model)
    if isinstance(layers, str):
        raise ValueError(layers)
    return layers


def _read(model: torch.nn.Module) -> list[DenseLayer] | str:
    """The layers, or why there is none of these."""
    layers: list[DenseLayer] = []
    for name, module in _leaves(model, ""):
        if any(module is layer.linear for layer in layers):
            return f"an MLP has each Linear once, got one again at {name}"
        if isinstance(module, torch.nn.Linear) and plain(module):
            layers.append(DenseLayer(name, module, None, None))
        elif not untouched(module, type(module)):
            return f"an MLP has no hooks and no forward of its own, got a {type(module).__name__} with one at {name}"
        elif type(module) is torch.nn.Identity or (type(module) is torch.nn.Flatten and not layers):
            continue
        elif not layers:
            return f"an MLP begins with a Linear, got {type(module).__name__} at {name}"
        elif type(module) is torch.nn.Dropout:
            last = layers[-1]
            if last.dropout is not None:
                return f"an MLP has one Dropout after a layer, got another at {name}"
            layers[-1] = DenseLayer(last.name, last.linear, last.activation, module)
        elif (activation := _activation_name(module)) is not None:
            last = layers[-1]
            if last.activation is not None or last.dropout is not None:
                return f"an MLP has one activation after each Linear, before its Dropout; got another at {name}"
            layers[-1] = DenseLayer(last.name, last.linear, activation, None)
        else:
            return f"an MLP is made of Linear, activations and Dropout, got {type(module).__name__} at {name}"
    return layers or f"an MLP is a torch.nn.Sequential with a Linear in it, got {type(model).__name__}"


def _leaves(module: torch.nn.Module, name: str) -> Iterator[tuple[str, torch.nn.Module]]:
    in_a_row = type(module).forward in (torch.nn.Sequential.forward, MLP.forward)
    if in_a_row and (not name or untouched(module, type(module))):
        for key, child in module._modules.items():  # named_children leaves out what comes again
            assert child is not None
            yield from _leaves(child, f"{name}.{key}" if name else key)
    else:
        yield name, module
