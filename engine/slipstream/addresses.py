"""Floor 1. Which addresses of a hub nobody but this machine's user can reach."""

from __future__ import annotations

import ipaddress


def stays_on_machine(address: str) -> bool:
    """Return whether a bind address is loopback TCP, or a path that the file system guards."""
    scheme, _, rest = address.partition("://")
    if scheme == "ipc":
        # An abstract name (@) has no folder whose permissions would guard it.
        return not rest.startswith("@")
    if scheme != "tcp":
        return scheme == "inproc"
    host = rest.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
