"""Over a real sshd on this machine: two names of it are two hosts."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest
from launcher import free_port, lines_in
from test_start import SLOWER, start, wait_for

SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin"]))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ranks,
    pytest.mark.skipif(not (SSHD and shutil.which("ssh")), reason="needs ssh and sshd"),
]


@pytest.fixture
def ssh(tmp_path):
    """The --rsh for an sshd of our own, with its own keys, on a free port of loopback."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    port, config = free_port(), tmp_path / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
    )
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)  # sshd as root wants it, and leaves it empty
    daemon = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=(tmp_path / "sshd.log").open("w"))
    try:
        until = time.monotonic() + 20
        while True:
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert daemon.poll() is None and time.monotonic() < until, (tmp_path / "sshd.log").read_text()
            time.sleep(0.05)
        options = "-o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        yield f"ssh -p {port} -i {tmp_path}/user {options} -l {getpass.getuser()} {{host}}"
    finally:
        daemon.terminate()
        daemon.wait()


def test_a_run_over_ssh_ends_with_the_one_who_started_it(ssh, tmp_path):
    """kill -9 of the launcher: the connections end, so the ranks save and leave; the same command goes on."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    flags = ("--nproc", "1", "--hosts", "localhost,127.0.0.1", "--rsh", ssh)
    job = start(tmp_path, *flags, options=SLOWER)
    wait_for(lambda: lines_in(metrics) >= 3, 120, job)
    job.send_signal(signal.SIGKILL)
    job.communicate(timeout=60)
    until = time.monotonic() + 60
    while not (tmp_path / "run" / "requeue").exists():
        assert time.monotonic() < until, "the ranks did not hear that the connection ended"
        time.sleep(0.1)
    time.sleep(3)
    job = start(tmp_path, *flags, options=SLOWER)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 0 and "resuming from" in out, err
    assert lines_in(metrics) == 10
