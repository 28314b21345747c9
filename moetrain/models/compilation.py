"""Functions that torch.compile calls between graphs instead of tracing them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def uncompiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: torch.compile breaks the graph here and runs the function, and all that it calls, eagerly.

    For functions whose shapes follow the data, or whose kernels the compiler does not know. As
    `torch.compiler.disable`, which however loads the compiler (over a second) when it decorates.
    """
    eager = torch._disable_dynamo(function)  # loads the compiler when first called

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            return eager(*args, **kwargs)
        return function(*args, **kwargs)

    return call
