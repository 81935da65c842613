"""Makes calls of autograd functions cheaper."""

import inspect
from collections.abc import Callable
from typing import Any


class _Bound:
    """What torch asks of inspect.BoundArguments."""

    def __init__(self, args: tuple[Any, ...]):
        self.args = args
        self.kwargs: dict[str, Any] = {}

    def apply_defaults(self) -> None:
        pass


class _Signature(inspect.Signature):
    """Takes all arguments as they come: there are no defaults to fill in."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return super().bind(*args, **kwargs) if kwargs else _Bound(args)


def positional(forward: Callable) -> Callable:
    """For the `forward` of a torch.autograd.Function with setup_context that is called with every argument, in order.

    Function.apply inspects and binds forward's signature at each call, half of what a call costs; here it is done once.
    """
    signature = _Signature(list(inspect.signature(forward).parameters.values()))
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward
