"""TCP ports that jobs on one node do not fight over."""

from __future__ import annotations

import socket

from skyrl.types import UserError

# Below the ports that the kernel hands to outgoing connections (32768 and up), above those of services.
FIRST, COUNT = 20000, 10000
STRIDE = 7  # no divisor of COUNT: jobs that follow each other start apart, and 10000 of them differ


def job_port(job: int, step: int = 0) -> int:
    """Where the search for a job's port begins: the same on all its nodes, another for each of 10000 jobs."""
    return FIRST + (STRIDE * (job + 31 * step)) % COUNT


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
