"""AdamW (Loshchilov and Hutter 2019), all parameters in one parallel pass."""

import torch

from .. import _dispatch
from . import _fused


class AdamW(torch.optim.AdamW):
    """As torch.optim.AdamW: same arguments, defaults, param groups, schedulers and state_dict, both ways.

    float32 and bfloat16 parameters, and float16 ones on NVIDIA GPUs, take the kernel (computed in float32; states in
    the parameter's dtype, as torch keeps them). Other devices and dtypes, sparse gradients, amsgrad, capturable,
    differentiable or a closure take torch's own step; `bmf.explain()` says so.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns what `closure`, if given, returned."""
        groups = [(g, _fused.with_gradients(g)) for g in self.param_groups]
        reasons = (_fused.unsupported(g, p, ("amsgrad", "capturable", "differentiable")) for g, p in groups)
        reason = "a closure" if closure is not None else next((r for r in reasons if r), None)
        if not _dispatch.use_native("AdamW", reason, _fused.first(groups)):
            return super().step(closure)
        for group, parameters in groups:
            states = []
            for p in parameters:
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
                    state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
                state["step"] += 1
                states.append(state)
            torch.ops.bigmodel_fast.adamw_(
                parameters,
                [p.grad for p in parameters],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [int(s["step"]) for s in states],
                float(group["lr"]),
                *(float(b) for b in group["betas"]),
                float(group["eps"]),
                float(group["weight_decay"]),
                bool(group["maximize"]),
            )
        return None
