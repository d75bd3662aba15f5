"""Floor 1. The ops as PyTorch's dispatcher knows them, under the name `slipstream`.

Each op is defined with its schema, implemented per device, and given a version that only computes shapes, so
that torch.compile sees one op. Gradients are autograd functions in Python around these ops: registering them
with the dispatcher costs a multiple per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

NAMESPACE: Final = "slipstream"
_LIBRARY: Final = torch.library.Library(NAMESPACE, "DEF")


def register(
    schema: str, *, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define an op for every device and return it; `fake` returns empty tensors of the results' shapes."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return op
