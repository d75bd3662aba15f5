"""Floor 6. Kernels for reinforcement learning of language models: the public ops, loaded when first used.

Importing this package imports neither torch nor NumPy.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slipstream_kernels.advantage import discounted_return, gae, td_lambda, vtrace
    from slipstream_kernels.checksum import checksum64, checksum64_named
    from slipstream_kernels.dispatch import Backend, backends
    from slipstream_kernels.errors import (
        BackendError,
        BackendUnavailableError,
        DeltaBaseError,
        DeltaError,
        KernelError,
        NativeError,
        ObjectiveError,
        ShapeError,
    )
    from slipstream_kernels.fp8 import Fp8Weight, fp8_dequantize, fp8_quantize
    from slipstream_kernels.group_advantage import Baseline, group_advantage, whiten
    from slipstream_kernels.linear_kl import linear_kl
    from slipstream_kernels.linear_logprob import linear_logprob
    from slipstream_kernels.linear_policy_loss import linear_policy_loss
    from slipstream_kernels.objective import (
        Aggregation,
        Correction,
        Level,
        Objective,
        Penalty,
        Surrogate,
    )
    from slipstream_kernels.policy_loss import batch_normalizer, policy_loss
    from slipstream_kernels.policy_result import PolicyLoss, PolicyMetrics, finish_metrics, merge_metrics
    from slipstream_kernels.segment_scan import segment_scan
    from slipstream_kernels.weight_delta import Delta, delta_apply, delta_encode, delta_encode_cast

__all__ = [
    "Aggregation",
    "Backend",
    "BackendError",
    "BackendUnavailableError",
    "Baseline",
    "Correction",
    "Delta",
    "DeltaBaseError",
    "DeltaError",
    "Fp8Weight",
    "KernelError",
    "Level",
    "NativeError",
    "Objective",
    "ObjectiveError",
    "Penalty",
    "PolicyLoss",
    "PolicyMetrics",
    "ShapeError",
    "Surrogate",
    "backends",
    "batch_normalizer",
    "checksum64",
    "checksum64_named",
    "delta_apply",
    "delta_encode",
    "delta_encode_cast",
    "discounted_return",
    "finish_metrics",
    "fp8_dequantize",
    "fp8_quantize",
    "gae",
    "group_advantage",
    "linear_kl",
    "linear_logprob",
    "linear_policy_loss",
    "merge_metrics",
    "policy_loss",
    "segment_scan",
    "td_lambda",
    "vtrace",
    "whiten",
]

_NAMES_OF_MODULE = {
    "advantage": "discounted_return gae td_lambda vtrace",
    "checksum": "checksum64 checksum64_named",
    "dispatch": "Backend backends",
    "errors": "BackendError BackendUnavailableError DeltaBaseError DeltaError KernelError NativeError"
    " ObjectiveError ShapeError",
    "fp8": "Fp8Weight fp8_dequantize fp8_quantize",
    "group_advantage": "Baseline group_advantage whiten",
    "linear_kl": "linear_kl",
    "linear_logprob": "linear_logprob",
    "linear_policy_loss": "linear_policy_loss",
    "objective": "Aggregation Correction Level Objective Penalty Surrogate",
    "policy_loss": "batch_normalizer policy_loss",
    "policy_result": "PolicyLoss PolicyMetrics finish_metrics merge_metrics",
    "segment_scan": "segment_scan",
    "weight_delta": "Delta delta_apply delta_encode delta_encode_cast",
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names.split()}


class _Package(ModuleType):
    """Lets an op win over the module of the same name that defines it, as attributes of the package."""

    def __setattr__(self, name: str, value: object) -> None:
        # The import system sets a submodule as an attribute of its package once it is loaded.
        if isinstance(value, ModuleType) and name in _MODULE_OF_NAME:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    """Import the module that defines `name`, on its first use."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
