"""Ports of jobs: far apart, and never one that is taken."""

import socket

import pytest

from skyrl.distributed import network as ports
from skyrl.launch.hosts import free_port
from skyrl.types import UserError


def test_ten_thousand_jobs_start_at_ten_thousand_ports():
    found = {ports.job_port(job) for job in range(123456, 133456)}
    assert len(found) == 10000 and min(found) == 20000 and max(found) == 29999
    assert ports.job_port(7) != ports.job_port(8) and ports.job_port(7, 1) != ports.job_port(7, 0)


def test_a_port_that_is_taken_is_passed_over():
    job = next(job for job in range(1000) if all(ports.is_free(ports.job_port(job) + i) for i in range(3)))
    with socket.socket() as one, socket.socket() as two:
        for number, server in enumerate((one, two)):
            server.bind(("", ports.job_port(job) + number))
            server.listen()
        assert free_port(job) == ports.job_port(job) + 2
        with pytest.raises(UserError, match="all taken on this node; give one with --port"):
            free_port(job, tries=2)
    assert free_port(job) == ports.job_port(job)


def test_who_looks_whether_a_port_is_free_lets_nobody_in(monkeypatch):
    reached, plain = [], socket.socket
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]

        class Watched(plain):
            def close(self):  # somebody comes at the last moment
                with plain() as other:
                    reached.append(other.connect_ex(("127.0.0.1", port)) == 0)
                super().close()

        monkeypatch.setattr(ports.socket, "socket", Watched)
        assert ports.is_free(port)
    assert reached and not any(reached)
