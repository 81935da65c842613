"""AdamW (Loshchilov and Hutter 2019), all parameters in one parallel pass."""

import torch
from torch import Tensor

from .. import _dispatch
from . import _fused
from .clip import clip_factor, clip_grad_norm_


class AdamW(torch.optim.AdamW):
    """As torch.optim.AdamW: same arguments, defaults, param groups, schedulers and state_dict, both ways.

    float32 and bfloat16 parameters, and float16 ones on NVIDIA GPUs, take the kernel (computed in float32; states in
    the parameter's dtype, as torch keeps them). Other devices and dtypes, sparse gradients, amsgrad, capturable,
    differentiable or a closure take torch's own step; `bmf.explain()` says so. Of DTensors (FSDP2) each process steps
    its shard.

    Args:
        stochastic_rounding: round bfloat16 parameters and their states up or down at random, so that updates smaller
            than half a unit in the last place count on average (Zamirai et al. 2020): training in bfloat16 alone, at
            half the memory. Other dtypes are rounded to nearest. The choices depend on the step and the element only,
            so runs repeat, and replicas stay equal. What the kernel does not take raises NotImplementedError.
    """

    def __init__(self, params, *args, stochastic_rounding: bool = False, **kwargs):
        super().__init__(params, *args, **kwargs)
        self.stochastic_rounding = stochastic_rounding
        self._grad_scale = 1.0  # what the next step multiplies gradients by

    def __getstate__(self):
        """Of copies and pickles, for which torch keeps its own attributes only."""
        return super().__getstate__() | {
            "stochastic_rounding": self.stochastic_rounding,
            "_grad_scale": self._grad_scale,
        }

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Has the next `step` scale the gradients so that their norm, all parameters together, is at most `max_norm`.

        As `clip_grad_norm_` before the step, also of shards, without its pass over the gradients: on CPU .grad stays as
        it is, and the step scales what it reads. On other devices, and where the kernel does not take the step, .grad
        is scaled here.

        Returns:
            The norm before clipping, float32.
        """
        self._grad_scale = 1.0
        groups = _fused.all_with_gradients(self.param_groups)
        parameters = [p for _, with_grad in groups for p in with_grad]
        reason = self._uncovered(groups) or next(
            (f"a {p.device.type} tensor" for p in parameters if not p.is_cpu), None
        )
        if reason or not parameters or not _dispatch.use_native("clip_grad_norm", reason, _fused.first(groups)):
            return clip_grad_norm_(parameters, max_norm)
        norm = _fused.norm_of_all(p.grad for p in parameters if p.grad is not None)
        self._grad_scale = clip_factor(norm, max_norm)
        return torch.tensor(norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; a clipping that no step has applied is forgotten with its gradients."""
        self._grad_scale = 1.0
        super().zero_grad(set_to_none)

    def _uncovered(self, groups) -> str | None:
        reasons = (_fused.unsupported(g, p, ("amsgrad", "capturable", "differentiable")) for g, p in groups)
        return next((r for r in reasons if r), None)

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns what `closure`, if given, returned."""
        groups = _fused.all_with_gradients(self.param_groups)
        reason = "a closure" if closure is not None else self._uncovered(groups)
        grad_scale, self._grad_scale = self._grad_scale, 1.0
        if not _dispatch.use_native("AdamW", reason, _fused.first(groups)):
            if self.stochastic_rounding:
                raise NotImplementedError(f"AdamW: stochastic_rounding is not there for {reason or 'this backend'}")
            if grad_scale != 1.0:
                for grad in (p.grad for _, parameters in groups for p in parameters if p.grad is not None):
                    grad.mul_(grad_scale)
            return super().step(closure)
        for group, parameters in groups:
            states = []
            for p in parameters:
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
                    state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
                states.append(state)
            steps = [s["step"] for s in states]
            torch._foreach_add_(steps, 1)
            torch.ops.bigmodel_fast.adamw_(
                _fused.local(parameters),
                _fused.local(p.grad for p in parameters if p.grad is not None),
                _fused.local(s["exp_avg"] for s in states),
                _fused.local(s["exp_avg_sq"] for s in states),
                [int(step.item()) for step in steps],
                float(group["lr"]),
                *(float(b) for b in group["betas"]),
                float(group["eps"]),
                float(group["weight_decay"]),
                bool(group["maximize"]),
                grad_scale,
                self.stochastic_rounding,
            )
            torch.autograd.graph.increment_version(parameters)
        return None
