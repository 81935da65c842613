"""Stochastic gradient descent with momentum, all parameters in one parallel pass."""

import torch

from .. import _dispatch
from . import _fused


class SGD(torch.optim.SGD):
    """As torch.optim.SGD: same arguments, defaults, param groups, schedulers and state_dict, both ways.

    float32 and bfloat16 parameters, and float16 ones on NVIDIA GPUs, take the kernel; everything else, torch's own
    step; `bmf.explain()` says so.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns what `closure`, if given, returned."""
        groups = _fused.all_with_gradients(self.param_groups)
        reasons = (_fused.unsupported(g, p, ("differentiable",)) for g, p in groups)
        reason = "a closure" if closure is not None else next((r for r in reasons if r), None)
        if not _dispatch.use_native("SGD", reason, _fused.first(groups)):
            return super().step(closure)
        for group, parameters in groups:
            buffers, steps = [], []
            for p in parameters if group["momentum"] else ():
                fresh = self.state[p].get("momentum_buffer") is None
                if fresh:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
                buffers.append(self.state[p]["momentum_buffer"])
                steps.append(1 if fresh else 2)
            torch.ops.bigmodel_fast.sgd_(
                _fused.local(parameters),
                _fused.local(p.grad for p in parameters if p.grad is not None),
                _fused.local(buffers),
                steps,
                float(group["lr"]),
                float(group["momentum"]),
                float(group["dampening"]),
                float(group["weight_decay"]),
                bool(group["nesterov"]),
                bool(group["maximize"]),
            )
            torch.autograd.graph.increment_version(parameters)
        return None
