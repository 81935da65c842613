"""How one module is accelerated and restored: its class is changed to a subclass made for it.

The subclass has the name and the module of the original, so that whatever reads them (checkpoints, FSDP policies,
transformers' configs) sees no difference. Nothing else about the module changes: parameters, buffers, hooks and keys
stay where they are, and `restore` is the original class put back.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import _dispatch

_PLAN = "_bmf_plan"  # in the module's __dict__
_subclasses: dict[tuple[type, type], type] = {}


class Fast:
    """Base of the recipes: stands before a module's own class, whose methods `super()` reaches.

    A recipe overrides methods and says with `match` which modules it takes.
    """

    area: ClassVar[str]  # the argument of accelerate() that switches it off
    methods: ClassVar[tuple[str, ...]] = ("forward",)
    finishes: ClassVar[bool] = False  # whether forward takes `bmf_finish` (projections.py)
    _bmf_original: ClassVar[type[nn.Module]]

    @classmethod
    def match(cls, module: nn.Module) -> "dict[str, Any] | str | None":
        """What forward needs to know, or why the module is left alone, or None where it is not of this kind."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._bmf_original, _recipe(self)), self.__dict__  # copies and pickles are accelerated too


def plan(module: Any) -> dict[str, Any]:
    """What `match` found out about an accelerated module."""
    return module.__dict__[_PLAN]


def original_class(module: nn.Module) -> type[nn.Module]:
    """A module's class, or the one it had before it was accelerated."""
    return getattr(type(module), "_bmf_original", type(module))


def is_fast(module: nn.Module) -> bool:
    return isinstance(module, Fast)


def apply(module: nn.Module, recipe: type[Fast], found: dict[str, Any]) -> None:
    """Makes a module run the recipe's methods."""
    module.__class__ = _subclass(type(module), recipe)
    module.__dict__[_PLAN] = found


def check_undo(module: nn.Module) -> None:
    """Raises where the original class cannot be put back."""
    changed = None
    if type(module) is not _subclass(original_class(module), _recipe(module)):
        changed = "class of a {} was changed after accelerate() (by fully_shard?)"
    elif "forward" in module.__dict__:
        changed = "forward of a {} was replaced after accelerate() (by Accelerate's prepare?)"
    if changed is not None:
        raise RuntimeError(f"restore: the {changed.format(type(module).__name__)}; undo that first")


def undo(module: nn.Module) -> None:
    """The original class again."""
    module.__class__ = original_class(module)
    del module.__dict__[_PLAN]


def _recipe(module: Any) -> type[Fast]:
    return next(c for c in type(module).__mro__ if "_bmf_original" in c.__dict__).__bases__[0]


def _subclass(cls: type, recipe: type[Fast]) -> type:
    made = _subclasses.get((cls, recipe))
    if made is None:
        methods = {name: _with_signature(getattr(recipe, name), getattr(cls, name)) for name in recipe.methods}
        named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        made = _subclasses[cls, recipe] = type(cls.__name__, (recipe, cls), {**methods, **named, "_bmf_original": cls})
    return made


def _with_signature(function: Any, original: Any) -> types.FunctionType:
    """A copy of a method that shows the signature of the one it replaces, which trainers and `generate` look at."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__, copy.__doc__ = function.__kwdefaults__, original.__doc__
    copy.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return copy


def _rebuild(cls: type, recipe: type[Fast]) -> Any:
    made: Any = _subclass(cls, recipe)
    return made.__new__(made)


# ---- what may be fused ----

FORWARD_REPLACED = "its forward was replaced on this instance"


def unusual(module: nn.Module) -> str | None:
    """Why a module cannot be replaced; None if it can."""
    if "forward" in module.__dict__:
        return FORWARD_REPLACED
    for p in module._parameters.values():
        if reason := unusual_tensor(p):
            return reason
    return None


def unusual_tensor(t: Tensor | None) -> str | None:
    """Why a weight cannot be handed to our operators: quantised, sharded, of an integer type."""
    if t is None or type(t) in (nn.Parameter, Tensor):
        return None if t is None or t.is_floating_point() else f"a weight of {t.dtype}"
    return f"a weight is a {type(t).__name__}"


def children(module: Any, *names: str) -> list[Any]:
    """Children by name, in a fraction of the time that attributes take."""
    return [module._modules[name] for name in names]


def hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def watched(module: nn.Module, has_hooks: Callable[[nn.Module], bool] = hooked) -> str | None:
    """Why a module has to be called by its own forward: someone watches or replaces it."""
    if has_hooks(module):
        return "has hooks"
    if module._compiled_call_impl is not None:
        return "was compiled on its own"
    return FORWARD_REPLACED if "forward" in module.__dict__ else None


def all_hooked() -> str | None:
    """Why no module can do the work of others at present."""
    return "hooks on all modules" if _has_any_global_hook() else None


def not_plain(module: Any, forward: Any) -> str | None:
    """Why a child's work cannot be done by its parent: it does not have this `forward`, or someone watches it."""
    if not isinstance(module, nn.Module) or original_class(module).forward is not forward:
        return f"is a {type(module).__name__}"
    return watched(module) or unusual(module)


def first_not_plain(parent: nn.Module, children: tuple[tuple[str, nn.Module, Any], ...]) -> str | None:
    """Names the first of (name, child, forward) that is not plain, and why."""
    for name, child, forward in children:
        if reason := not_plain(child, forward):
            return f"{name} {reason}"
    return None


def note(module: nn.Module, reason: str | None) -> bool:
    """Whether an accelerated module does its work; explain() lists the reason if not."""
    reason = reason or all_hooked()
    return _dispatch.use_native(f"accelerate: {type(module).__name__}", reason) if reason else True


def activation_watched(function: Any) -> str | None:
    """Why an activation, a module or not, has to be called."""
    reason = watched(function) if isinstance(function, nn.Module) else None
    return f"the activation {reason}" if reason else None


def active_dropout(*dropouts: nn.Module) -> float:
    """Probability of the dropout that is at work."""
    return next((d.p for d in dropouts if isinstance(d, nn.Dropout) and d.training), 0.0)


def without_autocast(t: Tensor) -> Any:
    return torch.autocast(t.device.type, enabled=False)
