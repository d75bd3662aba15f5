"""Floor 1. The ops as PyTorch's dispatcher knows them, under the name `slipstream`.

Each op is defined with its schema, implemented per device, and given a version that only computes shapes, so
that torch.compile sees one op. Gradients are autograd functions in Python around these ops: registering them
with the dispatcher costs a multiple per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
NAMESPACE: Final = "slipstream"
_LIBRARY: Final = torch.library.Library(NAMESPACE, "DEF")


def constant(function: Function) -> Function:
    """Let torch.compile take a function's result as a constant, as PyTorch's own mark does.

    That one loads the compiler, which takes longer than PyTorch itself.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def recorded(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return what records an autograd function: its `apply`, without the part that prepares for torch.func.

    That part costs 9 us a call, and only serves transforms that reject these functions anyway. While an
    op is being compiled, `apply` itself must be called.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def register(
    schema: str, *, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define an op for every device and return it; `fake` returns empty tensors of the results' shapes.

    schema: "name(arguments) -> results" in PyTorch's notation. Raises RuntimeError for a name that is taken.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return op
