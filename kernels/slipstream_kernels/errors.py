"""Floor 0. Every error the kernels raise, drawn as one tree.

KernelError
├── ShapeError                  an argument has the wrong shape, type or range
├── ObjectiveError              an objective that cannot be computed
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


class BackendError(KernelError, RuntimeError):
    """The chosen backend does not implement the op, or not for these arguments."""


class BackendUnavailableError(BackendError):
    """The chosen backend is not installed on this machine."""


class NativeError(BackendError):
    """A native function refused its arguments; the message names function and reason."""
