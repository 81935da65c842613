"""Makes calls of autograd functions cheaper."""

from functools import cache
from typing import Any, cast

import torch
from torch.compiler import is_compiling


@cache
def _in_one(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same function with setup_context as a part of forward, which torch calls without binding its arguments."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    body = {"forward": staticmethod(forward), "backward": staticmethod(function.backward), "__doc__": function.__doc__}
    return cast(type[torch.autograd.Function], type(function.__name__, (torch.autograd.Function,), body))


def _distinct(args: tuple[Any, ...]) -> list[Any]:
    """args, with a view in place of a tensor that came before: torch.compile traces no function that gets one twice."""
    found: list[Any] = []
    for arg in args:
        again = isinstance(arg, torch.Tensor) and any(arg is before for before in found)
        found.append(arg.view_as(arg) if again else arg)
    return found


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args), of a function with setup_context and without default arguments.

    torch inspects and binds the signature of such a forward at each call, half of what a call costs; only transforms of
    torch.func need it.
    """
    if is_compiling():
        return function.apply(*_distinct(args))
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return _in_one(function).apply(*args)
