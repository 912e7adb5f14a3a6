"""Where the ranks of a job meet: a store at MASTER_ADDR:MASTER_PORT."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from skyrl.distributed import network
from skyrl.distributed.agreement import POLL_SECONDS, READ_SECONDS, bounded, missing_after
from skyrl.distributed.place import origin
from skyrl.envs import clock
from skyrl.types import RunError, UserError, few

CONNECT_SECONDS = 5.0
_served: set[int] = set()  # ports where this process has kept a store: torch may still hold one there


def meet(rank: int, size: int, seconds: int) -> tuple[Any, str]:
    """(the store through which the ranks meet, once all of them are there; the address at which they reach this one).
    Raises RunError that names who is not there, UserError for an address or port that cannot be right."""
    until = clock.now() + seconds
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    where = f"{host}:{port} ({origin()})"
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{where}: no address and port (1 to 65535); start with torchrun, or set both for all ranks")
    limit = f"within run.join_seconds={seconds}"
    advice = "see whether their processes have started and can reach that address, or raise run.join_seconds"
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    with bounded(seconds, READ_SECONDS):
        try:
            store, here, there = _connect(host, int(port), keeps, seconds, until)
        except (dist.DistError, OSError, UnicodeError) as error:
            what = " ".join(str(error).split("\n")[0].split())[:160]
            raise RunError(f"the {size} ranks did not meet at {where} {limit} ({what}); {advice}") from None
        store.set(f"reached/{rank}", there)
        store.set(f"here/{rank}", socket.gethostname())
        if missing := missing_after(store, [f"here/{other}" for other in range(size)], until):
            if keeps and not network.is_local(host):  # and is no detour, of a container or a service, that leads here
                advice = (
                    f"{host} is no address of {socket.gethostname()}, where rank 0 runs: unset MASTER_ADDR, or set it"
                )
            raise RunError(
                f"{len(missing)} of {size} ranks did not come to {where} {limit} (ranks {few(missing, 8)}); {advice}"
            )
        return store, _own_address(store, size, here)


def _connect(host: str, port: int, keeps: bool, seconds: int, until: float) -> tuple[Any, str, str]:
    """The store, which this process keeps or somebody else; our address towards it, and its own ("" where we keep it).
    Raises DistError, OSError or UnicodeError when there is none."""
    here = there = ""
    if keeps:
        _check_port(port)
    else:
        here, there = _reach(host, port, until)
    store = dist.TCPStore(
        # Rank 0 reaches its own store whatever the others call this machine.
        "127.0.0.1" if keeps else host,
        port,
        is_master=keeps,
        timeout=timedelta(seconds=seconds),
        multi_tenant=True,
        wait_for_workers=False,
    )
    return _of_this_start(store), here, there


def _of_this_start(store: Any) -> Any:  # torchrun may keep one store over its restarts
    attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return (dist.PrefixStore if hasattr(dist.Store, "clone") else _OlderStore)(f"skyrl/{attempt}", store)


class _OlderStore(dist.PrefixStore):  # of torch 2.7, where a store has no clone: a connection for another thread
    def clone(self) -> Any:
        tcp: Any = self.underlying_store
        return _of_this_start(dist.TCPStore(tcp.host, tcp.port, None, False, tcp.timeout))


def _check_port(port: int) -> None:
    """Raises UserError when rank 0 cannot keep the store at this port."""
    if port not in _served and not network.is_free(port):
        raise UserError(
            f"MASTER_PORT={port} ({origin()}): another program listens there on {socket.gethostname()}, "
            "where rank 0 runs; set MASTER_PORT to a free one for all ranks, or unset it where a launcher chooses"
        )
    _served.add(port)


def _reach(host: str, port: int, until: float) -> tuple[str, str]:
    """Waits until somebody listens there; (our address towards it, its address). Raises OSError when nobody does in
    time.

    In Python, because torch's own waiting is deaf to signals: a launcher that ends us would have to wait for it."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as reached:
                return _plain(reached.getsockname()[0]), _plain(reached.getpeername()[0])
        except OSError:
            if clock.now() > until:
                raise
        time.sleep(POLL_SECONDS)


def _plain(address: str) -> str:
    """An address without an interface (%eth0), and of IPv4 where it is one in IPv6's clothes."""
    return address.partition("%")[0].removeprefix("::ffff:")


def _is_loopback(address: str) -> bool:
    return address in ("", "::1") or address.startswith("127.")


def _own_address(store: Any, size: int, here: str) -> str:
    """The address at which the other ranks reach this one: that of the socket that reached the store. On the store's
    own machine, which is reached over loopback there, the address by which others have come."""
    if not _is_loopback(here):
        return here
    others = {text.decode() for text in store.multi_get([f"reached/{rank}" for rank in range(size)])}
    outside = sorted(address for address in others if not _is_loopback(address) and network.interface_of(address))
    return outside[0] if outside else here or "127.0.0.1"
