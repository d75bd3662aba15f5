"""Floor 4. The filter of system calls that a worker of a sandbox runs under, as classic BPF.

A refused call fails with EPERM, `clone3` with ENOSYS so that libraries use `clone`, which can be judged by
its flags. A program of another architecture is killed. Allowed is whatever else is there: the filter is the
third wall, behind namespaces and uid.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
from functools import lru_cache
from typing import Any, Final

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT, _SECOND_ARGUMENT_AT = 0, 4, 16, 24
_SOCKET_TYPE: Final = 0xF
_X32: Final = 0x40000000
_NEW_NAMESPACES: Final = 0x7E020080
_EVERYBODY: Final = 0xFFFFFFFF
"""-1, as kill takes it."""
_AUDIT: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN: Final = {"x86_64": 0, "aarch64": 1}
KILL, CLONE, CLONE3, SOCKETPAIR = (62, 129), (56, 220), (435, 435), (53, 199)

REFUSED: Final[dict[str, tuple[int, int]]] = {
    # name: (x86_64, aarch64)
    # Other processes.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    # The network: connected pairs of sockets remain.
    "socket": (41, 198),
    # Mounts and namespaces.
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # Memory that no limit counts.
    "memfd_create": (319, 279), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180),
    # Wide doors into the kernel.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "personality": (135, 92),
    # The machine.
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "sethostname": (170, 161), "setdomainname": (171, 162), "acct": (163, 89), "syslog": (103, 116),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
}  # fmt: skip


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def system(function: str, *arguments: Any) -> int:
    """Call a function of the C library by name; raises OSError when it returns -1."""
    result: int = getattr(_library(), function)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return result


def prctl(option: int, *arguments: int) -> None:
    """Call prctl(2); raises OSError."""
    words = [ctypes.c_ulong(word) for word in (*arguments, 0, 0, 0, 0)[:4]]
    system("prctl", option, *words)


def forbid_system_calls() -> bool:
    """Refuse the calls of `REFUSED` to this process and all it starts, for ever.

    Returns False where the architecture or the kernel has no such filter. Needs no_new_privs.
    """
    if platform.machine() not in _AUDIT:
        return False
    code = program(platform.machine())
    buffer = ctypes.create_string_buffer(code)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    whole = Program(len(code) // 8, ctypes.addressof(buffer))
    try:
        system("prctl", _PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(whole), 0, 0)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True


def program(machine: str) -> bytes:
    """Return the filter for "x86_64" or "aarch64": 8 bytes each of code, jump true, jump false, operand."""
    column = _COLUMN[machine]
    refuse = _ERRNO | errno.EPERM
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _AUDIT[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    if machine == "x86_64":
        lines += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    lines += [(_EQUAL, 0, 1, CLONE3[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    for numbers in REFUSED.values():
        lines += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, refuse)]
    for call, test, operand in (
        (KILL[column], _EQUAL, _EVERYBODY),
        (CLONE[column], _ANY_BIT, _NEW_NAMESPACES),
    ):
        lines += [
            (_EQUAL, 0, 4, call),
            (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
            (test, 0, 1, operand),
            (_RETURN, 0, 0, refuse),
            (_RETURN, 0, 0, _ALLOW),
        ]
    lines += [
        (_EQUAL, 0, 6, SOCKETPAIR[column]),
        (_LOAD, 0, 0, _SECOND_ARGUMENT_AT),
        (_AND, 0, 0, _SOCKET_TYPE),
        (_EQUAL, 2, 0, socket.SOCK_STREAM),
        (_EQUAL, 1, 0, socket.SOCK_SEQPACKET),
        # A datagram socket of a pair can send to any other by its address.
        (_RETURN, 0, 0, refuse),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("<HBBI", *line) for line in lines)
