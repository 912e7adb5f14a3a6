"""Ports, addresses and interfaces between ranks. Imports without torch.

gloo and NCCL choose an interface by the name of the host or by the order of interfaces. On many clusters that name
means nothing, or 127.0.0.1, and other nodes are then told to connect to themselves. So the interface is that of the
socket that reached the place where all ranks meet.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping

import psutil

from skyrl.types import UserError

# Below the ports that the kernel hands to outgoing connections (32768 and up), above those of services.
FIRST, COUNT = 20000, 10000
STRIDE = 7  # no divisor of COUNT: jobs that follow each other start apart, and 10000 of them differ
GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
MAX_SKEW = 2.0  # seconds that clocks of two machines may differ


def job_port(job: int, step: int = 0) -> int:
    """Where the search for a job's port begins: the same on all its nodes, another for each of 10000 jobs."""
    return FIRST + (STRIDE * (job + 31 * step)) % COUNT


def is_free(port: int) -> bool:
    """Whether a server could listen there now on all addresses, as those of ranks do.

    Without listening: a rank that comes at that moment would be let in, and would wait for words from nobody."""
    both = socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if both else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do; who listens is met all the same
        try:
            if both:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind(("", port))
            return True
        except (OSError, OverflowError):  # the latter for what is no port
            return False


def interfaces() -> dict[str, list[str]]:
    """Interface -> its addresses, those that are up."""
    up = {name for name, one in psutil.net_if_stats().items() if one.isup}
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [one.address.partition("%")[0] for one in sorted(found) if one.family in families]
        for name, found in sorted(psutil.net_if_addrs().items())
        if name in up or name.partition(":")[0] in up
    }


def interface_of(address: str) -> str:
    """The interface that has an address; "" when this host does not have it. 127.0.0.0/8 is all loopback's."""
    known = interfaces()
    if address.startswith("127."):
        return next((name for name, found in known.items() if "127.0.0.1" in found), "")
    return next((name for name, found in known.items() if address in found), "")


def interface_problem(variable: str, environment: Mapping[str, str] = os.environ) -> str:
    """What is wrong with the interface that gloo or NCCL is told to use, in words; "" when nothing is.

    gloo takes whole names, NCCL beginnings of names, `=` before a whole one and `^` before those to leave out."""
    chosen = environment.get(variable, "")
    if not chosen or chosen.startswith("^"):
        return ""
    names = list(interfaces())
    whole = variable == GLOO or chosen.startswith("=")
    wanted = chosen.removeprefix("=").split(",")
    found = [one for one in wanted if any(name == one if whole else name.startswith(one) for name in names)]
    if found == wanted or (found and variable == NCCL):  # NCCL takes what is there of a list
        return ""
    return (
        f"{variable}={chosen}: no such interface on {socket.gethostname()}, there are {', '.join(names)}; unset "
        f"{variable} (the one that reaches rank 0 is taken), or give one of these"
    )


def use_interface(address: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Tells gloo and NCCL to use the interface that has `address`, unless the user has. Raises UserError for an
    interface of the user's that is not there."""
    name = interface_of(address)
    for variable, value in ((GLOO, name), (NCCL, f"={name}")):
        if problem := interface_problem(variable, environment):
            raise UserError(problem)
        if name and not environment.get(variable):
            environment[variable] = value


def is_local(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine; True for a name that only others know."""
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return True
    return any(interface_of(address) for address in addresses)
