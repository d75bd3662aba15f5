"""Floor 0. Every error the kernels raise, drawn as one tree.

KernelError
├── ShapeError                  an argument has the wrong shape, type or range
├── ObjectiveError              an objective that cannot be computed
├── DeltaError                  a delta of weights is damaged or not one
│   └── DeltaBaseError              it was made from other weights than these
└── BackendError                the chosen backend cannot run the op
    ├── BackendUnavailableError     it exists but is not installed here
    └── NativeError                 a native function refused its arguments
"""


class KernelError(Exception):
    """Root of all errors raised by slipstream_kernels."""


class ShapeError(KernelError, ValueError):
    """An argument has the wrong shape, type or range."""


class ObjectiveError(KernelError, ValueError):
    """An objective whose members cannot work together."""


class DeltaError(KernelError, ValueError):
    """The bytes are not a whole delta of weights, or their result is not what they promise."""


class DeltaBaseError(DeltaError):
    """The delta was made from other weights than those it is applied to."""


class BackendError(KernelError, RuntimeError):
    """The chosen backend does not implement the op, or not for these arguments."""


class BackendUnavailableError(BackendError):
    """The chosen backend is not installed on this machine."""


class NativeError(BackendError):
    """A native function refused its arguments; the message names function and reason."""
