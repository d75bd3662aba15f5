"""Floor 0. Every error a user can meet, drawn as one tree.

SlipstreamError                 exit code 1 unless said otherwise
├── UserError                   the user can mend it: one sentence, exit code 2, no traceback
│   ├── ConfigurationError      unknown key, wrong type, a combination that cannot work
│   ├── RunFolderError          a run folder that is missing, foreign or already in use
│   ├── CheckpointError         a checkpoint or model folder that is missing or damaged
│   ├── AddressError            a port in use, an address nobody answers
│   ├── WarmStartError          the warm-started policy is outside the learnable band
│   └── MonitorError            a monitor of the environment's author wants the run to end
├── ProtocolError               a peer broke the wire protocol
│   ├── FrameError              bytes that are not a valid message; names what was expected and got
│   │   └── DamageError         bytes that changed on their way: sent once more they may be right
│   └── RefusedError            the hub refused this peer (version, schema, run, epoch)
├── StorageError                a log, spool or disk that failed
├── InfrastructureError         what an environment stands on failed: its episode is masked, not judged
├── ToolError                   what a tool refuses and the policy is meant to read: an observation
├── DeadlineError               a wait ran out; names who waited for whom and since when
├── NumericsError               non-finite values several steps in a row; exit code 3: nobody tries again
└── RoleError                   a supervised process ended unexpectedly
"""

import errno

_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})


class SlipstreamError(Exception):
    """Root of all errors raised by Slipstream."""

    exit_code = 1


class UserError(SlipstreamError):
    """A mistake the user can mend: the message names what, where, expected, got and what to do."""

    exit_code = 2


class ConfigurationError(UserError):
    """A configuration key or value that is not valid."""


class RunFolderError(UserError):
    """A run folder that is missing, belongs to another configuration, or is in use."""


class CheckpointError(UserError):
    """A checkpoint or model folder that is missing or damaged."""


class AddressError(UserError):
    """An address that cannot be bound or reached."""


class WarmStartError(UserError):
    """The warm-started policy is too weak for reinforcement learning to start."""


class MonitorError(UserError):
    """A monitor of the environment found what should not happen, and its author wants the run to end then."""


class ProtocolError(SlipstreamError):
    """A peer broke the wire protocol."""


class FrameError(ProtocolError):
    """Bytes that are not a valid message."""


class DamageError(FrameError):
    """Bytes that changed on their way: their check does not match, and sent once more they may be right."""


class RefusedError(ProtocolError):
    """The hub refused this peer; the message carries the hub's reason."""

    exit_code = 2


class StorageError(SlipstreamError):
    """A spool, log or disk that failed."""


def disk_failure(error: OSError) -> StorageError:
    """Return a full or broken disk's error as one sentence; raises any other error as it is."""
    if error.errno not in _DISK:
        raise error
    return StorageError(f"{error.filename or 'the disk'}: {error.strerror}; free space or repair the disk")


class InfrastructureError(SlipstreamError):
    """What an environment stands on failed (a database, a server); says nothing about the policy."""


class ToolError(SlipstreamError):
    """A tool refuses a call; the message is shown to the policy, and the call is not made again."""


class DeadlineError(SlipstreamError):
    """A wait ran out."""


class NumericsError(SlipstreamError):
    """Non-finite values several steps in a row; the same checkpoint and data would give them again."""

    exit_code = 3


class RoleError(SlipstreamError):
    """A supervised process ended unexpectedly."""
