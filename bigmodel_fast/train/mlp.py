"""Training of multilayer perceptrons by the native engine: a step, or a whole epoch, in one call.

model = bmf.models.MLP([784, 128, 64, 10])
trainer = bmf.train.MLPTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
for _ in range(10):
    print(trainer.epoch(bmf.data.Images.load("mnist").loader(64, shuffle=True)))
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._C import Activation, MlpJob
from ..data import ArrayLoader
from ..models.mlp import dense_layers

CALL_SECONDS = 0.05  # about how long a native call takes: then comes Ctrl-C's turn, and that of a progress callback
FIRST_CALL_FLOP = 1e9  # of the first call, whose speed is not known yet

_LOSSES = ("cross_entropy", "mse")
_DTYPES = ("fp32", "bf16")
_NOT_SUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")


@dataclass(frozen=True)
class EpochResult:
    """What an epoch (or what has been done of one) came to.

    Args:
        steps: done, of `total`.
        loss: mean over the steps' samples.
        accuracy: share of samples that were right when it was their turn; None for mse.
        seconds: of wall clock.
    """

    steps: int
    total: int
    loss: float
    accuracy: float | None
    seconds: float


class MLPTrainer:
    """Trains an MLP as an eager PyTorch loop would, from forward to the optimizer's update, in native code.

    The model's parameters and the optimizer's states are updated in place, and learning rates and the like are read
    from the optimizer at each call: model and optimizer can be used, saved and trained on in torch at any time, and
    schedulers work as ever. Results equal those of the eager loop but for rounding, given the same order of samples;
    they are the same bits for any number of threads. Dropout draws other numbers than torch.

    Args:
        model: an MLP, or a torch.nn.Sequential of Linear, activations and Dropout (models.mlp.dense_layers); contiguous
            float32 parameters on the CPU. A model on a GPU trains by a loop over its passes, which models.MLP fuses.
        loss: "cross_entropy" (targets are classes, [N] int64) or "mse" (values, [N, outputs] float32); means, as
            torch's.
        optimizer: torch.optim.SGD, Adam or AdamW, or this library's, over the model's parameters. Those it does not
            hold stay as they are.
        dtype: "fp32", or "bf16": products of bfloat16 operands, with float32 sums, parameters and states; on machines
            that do not multiply bfloat16 it computes as fp32.

    Raises:
        TypeError, ValueError: a model, loss or optimizer it cannot take.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: str = "cross_entropy",
        optimizer: torch.optim.Optimizer | None = None,
        *,
        dtype: str = "fp32",
    ):
        if loss not in _LOSSES:
            raise ValueError(f"MLPTrainer: loss must be one of {', '.join(_LOSSES)}, got {loss!r}")
        if dtype not in _DTYPES:
            raise ValueError(f"MLPTrainer: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        if not isinstance(optimizer, torch.optim.SGD | torch.optim.Adam):
            kind = "none" if optimizer is None else type(optimizer).__name__
            raise TypeError(f"MLPTrainer: optimizer must be a torch.optim.SGD, Adam or AdamW, got {kind}")
        self.model, self.loss, self.optimizer, self.dtype = model, loss, optimizer, dtype
        try:
            self.layers = dense_layers(model)
        except ValueError as error:
            raise ValueError(f"MLPTrainer: {error}") from None
        for before, after in zip(self.layers, self.layers[1:], strict=False):
            if before.linear.out_features != after.linear.in_features:
                raise ValueError(
                    f"MLPTrainer: layer {after.name} takes {after.linear.in_features} features, "
                    f"but {before.name} gives {before.linear.out_features}"
                )
        for layer in self.layers:
            for name, p in layer.linear.named_parameters():
                if p.device.type != "cpu":
                    raise TypeError(
                        f"MLPTrainer: trains on the CPU, but {layer.name}.{name} is on {p.device}: there, train it by "
                        "a loop of forward, backward and optimizer steps"
                    )
        self._flop_per_sample = 6.0 * sum(layer.linear.weight.numel() for layer in self.layers)
        self._steps_per_second = 0.0
        self._group_of()  # an optimizer that does not fit is an error now

    def step(self, x: Tensor, target: Tensor) -> float:
        """One step on the batch `x` [N, ...], uint8 (taken as shares of 255) or float32, and its targets; the loss."""
        loader = ArrayLoader(x, target, batch_size=len(x))
        return self.epoch(loader).loss

    def epoch(
        self,
        loader: ArrayLoader,
        *,
        order: Tensor | None = None,
        scheduler: Any = None,
        progress: Callable[[EpochResult], Any] | None = None,
        resume: EpochResult | None = None,
    ) -> EpochResult:
        """One pass over a loader's samples.

        Args:
            loader: of arrays in memory, which are read in place; its batch size, order and distortions hold.
            order: [any] int64, the samples to take instead, in this order.
            scheduler: a scheduler of torch.optim.lr_scheduler whose steps are this method's; None: learning rates stay.
            progress: called some twenty times a second with what has been done.
            resume: go on behind what has been done of this epoch before; torch's generator must be as when it began.

        Raises:
            ValueError, TypeError, IndexError: samples, targets or an order that do not fit the model.
            KeyboardInterrupt: after Ctrl-C, within about a twentieth of a second; model and optimizer are then those
                after a whole number of steps.
        """
        if not isinstance(loader, ArrayLoader):
            raise TypeError(f"MLPTrainer: loader must be a bigmodel_fast.data.ArrayLoader, got {type(loader).__name__}")
        targets = self._check(loader)
        seed = loader.draw_seed()
        if seed == 0 and any(self._dropouts()):
            seed = int(torch.randint(2**62, ()).item())
        if order is None:
            order = loader.order()
        elif order.dtype is not torch.int64 or order.dim() != 1 or not len(order):
            raise TypeError(
                f"MLPTrainer: order must be [any] int64 and not empty, got {order.dtype}{list(order.shape)}"
            )
        elif not 0 <= int(order.min()) <= int(order.max()) < len(loader.x):
            raise IndexError(f"MLPTrainer: order must hold samples in [0, {len(loader.x)}), got {int(order.max())}")
        order, batch = order.contiguous(), loader.batch_size
        total, started = -(-len(order) // batch), time.perf_counter()
        result = resume or EpochResult(0, total, 0.0, None, 0.0)
        done, seen, started = result.steps, result.steps * batch, started - result.seconds
        loss_sum, right = result.loss * seen, round((result.accuracy or 0.0) * seen)
        while done < total:
            steps = min(total - done, self._steps_a_call(batch))
            part = order[done * batch : (done + steps) * batch]
            job = self._job(loader, part, seed, done, targets)
            began = time.perf_counter()
            losses, correct = job.train(self.loss, self.dtype == "bf16", list(self._options(steps, scheduler)))
            self._steps_per_second = steps / max(time.perf_counter() - began, 1e-9)
            self._count_steps(steps)
            sizes = [batch] * (steps - 1) + [len(part) - (steps - 1) * batch]
            loss_sum += sum(loss * size for loss, size in zip(losses, sizes, strict=True))
            right, done = right + sum(correct), done + steps
            seen = min(done * batch, len(order))
            accuracy = right / seen if self.loss == "cross_entropy" else None
            result = EpochResult(done, total, loss_sum / seen, accuracy, time.perf_counter() - started)
            if progress is not None:
                progress(result)
        return result

    # ---- what is handed to the native side ----

    def _dropouts(self) -> list[float]:
        return [d.p if (d := layer.dropout) is not None and d.training else 0.0 for layer in self.layers]

    def _check(self, loader: ArrayLoader) -> Tensor | None:
        """Samples and targets fit the model; the float targets if they must be kept alive in another shape."""
        features, outputs = self.layers[0].linear.in_features, self.layers[-1].linear.out_features
        if loader.features != features:
            raise ValueError(f"MLPTrainer: samples have {loader.features} features, the model takes {features}")
        y = loader.y
        if self.loss == "cross_entropy":
            if y.dtype is not torch.int64 or y.dim() != 1:
                raise TypeError(f"MLPTrainer: cross_entropy needs targets [N] int64, got {y.dtype}{list(y.shape)}")
            if not (int(y.min()) >= 0 and int(y.max()) < outputs):
                at = int(((y < 0) | (y >= outputs)).nonzero()[0])
                raise IndexError(
                    f"MLPTrainer: label {int(y[at])} of sample {at} is out of range for a model of {outputs} outputs"
                )
        elif y.dtype is not torch.float32 or y.numel() != len(y) * outputs:
            raise TypeError(f"MLPTrainer: mse needs targets [N, {outputs}] float32, got {y.dtype}{list(y.shape)}")
        if any(share == 1.0 for share in self._dropouts()):
            raise ValueError("MLPTrainer: dropout must be below 1")
        return y

    def _steps_a_call(self, batch: int) -> int:
        if self._steps_per_second:
            return max(1, int(self._steps_per_second * CALL_SECONDS))
        return max(1, int(FIRST_CALL_FLOP / (self._flop_per_sample * batch)))

    def _group_of(self) -> dict[Tensor, int]:
        """The optimizer's group of each parameter it holds."""
        groups = self.optimizer.param_groups
        for group in groups:
            for option in _NOT_SUPPORTED:
                if group.get(option):
                    raise ValueError(f"MLPTrainer: the optimizer's option {option} is not supported")
        held = {p: i for i, group in enumerate(groups) for p in group["params"]}
        own = [p for layer in self.layers for p in layer.linear.parameters()]
        if not any(p in held for p in own):
            raise ValueError("MLPTrainer: the optimizer holds no parameter of the model")
        return held

    def _job(self, loader: ArrayLoader, order: Tensor, seed: int, first_step: int, targets: Tensor | None) -> MlpJob:
        job, group_of = MlpJob(), self._group_of()
        loader.fill_job(job, order, seed, first_step)
        for i, (layer, dropout) in enumerate(zip(self.layers, self._dropouts(), strict=True)):
            linear = layer.linear
            kind = getattr(Activation, layer.activation or "none")
            job.add_layer(linear.in_features, linear.out_features, kind, dropout)
            for name, p in linear.named_parameters():
                if p.dtype is not torch.float32 or p.device.type != "cpu" or not p.is_contiguous():
                    raise TypeError(
                        f"MLPTrainer: {layer.name}.{name} must be contiguous float32 on the CPU, "
                        f"got {p.dtype} on {p.device}"
                    )
                held = group_of.get(p) if p.requires_grad else None
                states = self._states(p, held)
                job.set_parameter(
                    i, name == "bias", p.data_ptr(), *states, 0 if held is None else held, self._steps_of(p)
                )
        return job

    def _states(self, p: Tensor, held: int | None) -> tuple[str, int, int, bool, bool, bool]:
        """Rule, addresses of states (made if there are none yet), nesterov, decoupled decay, and whether m is fresh."""
        if held is None:
            return "none", 0, 0, False, False, False
        group, state = self.optimizer.param_groups[held], self.optimizer.state[p]
        if isinstance(self.optimizer, torch.optim.SGD):
            if not group["momentum"]:
                return "sgd", 0, 0, False, False, False
            fresh = state.get("momentum_buffer") is None
            if fresh:
                state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            return "sgd", _address(state["momentum_buffer"]), 0, bool(group["nesterov"]), False, fresh
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        decoupled = isinstance(self.optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
        return "adam", _address(state["exp_avg"]), _address(state["exp_avg_sq"]), False, decoupled, False

    def _steps_of(self, p: Tensor) -> int:
        state = self.optimizer.state.get(p) or {}
        return int(state["step"]) if "step" in state else 0

    def _options(self, steps: int, scheduler: Any) -> Iterator[list[float]]:
        """The groups' options for each step, after which a scheduler makes its own."""
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                if isinstance(self.optimizer, torch.optim.SGD):
                    pair = (group["momentum"], group["dampening"])
                    eps = 0.0
                else:
                    pair, eps = group["betas"], group["eps"]
                yield [float(group["lr"]), float(group["weight_decay"]), float(pair[0]), float(pair[1]), float(eps)]
            if scheduler is not None:
                setattr(self.optimizer, "_opt_called", True)  # noqa: B010  (schedulers ask whether steps come first)
                scheduler.step()

    def _count_steps(self, steps: int) -> None:
        """Tells the optimizer's states, and autograd, that parameters have changed."""
        changed = [p for p in self._group_of() if p.requires_grad]
        for p in changed:
            if "step" in self.optimizer.state.get(p, {}):
                self.optimizer.state[p]["step"] += steps
        own = {p for layer in self.layers for p in layer.linear.parameters()}
        torch.autograd.graph.increment_version([p for p in changed if p in own])


def _address(state: Tensor) -> int:
    if state.dtype is not torch.float32 or state.device.type != "cpu" or not state.is_contiguous():
        raise TypeError(f"MLPTrainer: the optimizer's states must be contiguous float32 on the CPU, got {state.dtype}")
    return state.data_ptr()
