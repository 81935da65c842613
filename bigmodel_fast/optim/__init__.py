"""Fused optimizers, gradient clipping and schedules."""

from .adamw import AdamW
from .clip import clip_grad_norm_
from .schedule import cosine, linear, warmup_cosine
from .sgd import SGD

__all__ = ["SGD", "AdamW", "clip_grad_norm_", "cosine", "linear", "warmup_cosine"]
