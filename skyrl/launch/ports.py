"""TCP ports that jobs on one node do not fight over."""

from __future__ import annotations

import socket

from skyrl.distributed.env import COUNT, FIRST, job_port
from skyrl.types import UserError


def is_free(port: int, host: str = "") -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError:
            return False
    return True


def free_port(job: int, tries: int = 64) -> int:
    """The first free port from job_port(job) on. Raises UserError when none of `tries` is."""
    first = job_port(job)
    for step in range(tries):
        port = FIRST + (first - FIRST + step) % COUNT
        if is_free(port):
            return port
    raise UserError(f"ports {first} to {first + tries - 1} are all taken on this node; give one with --port")


def main() -> None:
    """`python -m skyrl.launch.ports <job id>`: prints a free port of this node for that job."""
    import sys

    print(free_port(int(sys.argv[1])))


if __name__ == "__main__":
    main()
