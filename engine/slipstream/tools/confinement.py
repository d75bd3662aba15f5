"""Floor 4. What a worker of a sandbox gives up before it runs a tool: uid, namespaces, capabilities, limits.

keeper    own uid where it may choose one, then new user, pid, mount, network, ipc, uts and cgroup
          namespaces; where the kernel refuses those, subreaper of whatever its worker leaves behind
worker    first process of the pid namespace: everything read-only but a bounded scratch folder, no
          /proc, no file of the parent, resource limits, no capability, and the filter of `system_calls`
"""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from slipstream.tools.system_calls import forbid_system_calls, prctl, system

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES: Final = _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWUSER | _NEWPID | _NEWNET
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 0x1, 0x2, 0x4, 0x4000, 0x40000
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_SETATTR: Final = 442
"""The same number on every architecture, as of all calls since 424."""
FIRST_UID: Final = 61184
UIDS: Final = 256
"""Started as root, workers take these uids in turn: none owns a file, systemd keeps them free."""
_LAST_CAPABILITY: Final = 63
_CAPABILITY_VERSION_3: Final = 0x20080522
SCRATCH_FILES: Final = 4096


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker may use."""

    memory_bytes: int
    """Address space of each of its processes."""
    scratch_bytes: int
    """Its scratch folder, and the largest file."""
    processes: int
    open_files: int
    cpu_s: int
    """CPU time of each of its processes."""
    scratch: str
    """The one folder it can write to."""
    namespaces: bool = True
    """Whether to ask the kernel for namespaces at all."""


class Confinement(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is confined by."""

    namespaces: bool
    """Own pids, network, mounts, users; else only limits, uid (as root) and the filter."""
    filtered: bool
    """The filter of system calls is in force."""


def become_keeper(number: int, *, namespaces: bool) -> None:
    """Prepare this process to fork worker `number`, into namespaces of its own where they work.

    Raises OSError when the host is out of processes or memory.
    """
    os.setsid()
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    die_with_parent()
    if not namespaces:
        return
    _drop_root(number)
    _enter_namespaces()
    # The change of user has forgotten it.
    die_with_parent()


def namespaces_work() -> bool:
    """Return whether the kernel lets a process like this one have namespaces; tried in a child."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _drop_root(0)
            _enter_namespaces()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def confine(limits: Limits, number: int, keep: int, *, namespaces: bool) -> Confinement:
    """Give up everything that worker `number` does not need; only the file descriptor `keep` stays open.

    Raises OSError when that cannot be done.
    """
    die_with_parent()
    os.setsid()
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    scratch = Path(limits.scratch)
    if namespaces:
        _own_file_system(scratch, limits.scratch_bytes)
    else:
        scratch = scratch / str(number)
        scratch.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(scratch, *[FIRST_UID + number % UIDS] * 2)
        _drop_root(number)
        die_with_parent()
    os.chdir(scratch)
    os.environ.update(HOME=str(scratch), TMPDIR=str(scratch))
    _leave_files(keep)
    _limit(limits)
    _drop_capabilities()
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    return Confinement(namespaces=namespaces, filtered=forbid_system_calls())


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends."""
    prctl(_PR_SET_PDEATHSIG, 9)


def _drop_root(number: int) -> None:
    """As root, become a user who owns nothing: root is exempt from most limits."""
    if os.geteuid() != 0:
        return
    user = FIRST_UID + number % UIDS
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    # A change of user makes /proc/self root's; the maps there are yet to be written.
    prctl(_PR_SET_DUMPABLE, 1)


def _enter_namespaces() -> None:
    user, group = os.geteuid(), os.getegid()
    system("unshare", NAMESPACES)
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        Path(f"/proc/self/{name}").write_text(line, encoding="utf-8")


def _own_file_system(scratch: Path, size: int) -> None:
    system("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    _make_read_only()
    quiet = _MS_NOSUID | _MS_NODEV
    options = f"size={size},nr_inodes={SCRATCH_FILES},mode=0700".encode()
    system("mount", b"tmpfs", os.fsencode(scratch), b"tmpfs", quiet, options)
    for hidden in (b"/proc", b"/run", b"/dev/shm"):
        if Path(os.fsdecode(hidden)).is_dir():
            system("mount", b"tmpfs", hidden, b"tmpfs", quiet | _MS_RDONLY, b"size=4k,mode=0555")


def _make_read_only() -> None:
    """Make every mount read-only, in one call."""
    attributes = (ctypes.c_uint64 * 4)(_MS_RDONLY | _MS_NOSUID, 0, 0, 0)
    system("syscall", _MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, ctypes.byref(attributes), 32)


def _leave_files(keep: int) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(3, keep)
    os.closerange(keep + 1, 1 << 16)
    os.set_inheritable(keep, False)


def _limit(limits: Limits) -> None:
    for kind, most in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.scratch_bytes),
        (resource.RLIMIT_NPROC, limits.processes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _drop_capabilities() -> None:
    for capability in range(_LAST_CAPABILITY + 1):
        # Those this kernel does not know, and all of them without the right to, are refused.
        with suppress(OSError):
            prctl(_PR_CAPBSET_DROP, capability)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    system("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
