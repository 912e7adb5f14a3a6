"""Stand-ins for apptainer and enroot, for machines without them: a rank is started as the real program would.

They isolate nothing. They read their arguments as the programs' own documentation and sources do (apptainer 1.5, enroot
4.1), refuse what those refuse, and hand the command the same environment, folder, signals and exit code:

- apptainer stays as the parent, passes signals on to its child, and replaces PATH and LD_LIBRARY_PATH.
- enroot becomes the command; its environment is the image's /etc/environment and what --env names, nothing else; it
  starts through a login shell and the image's /etc/rc, or what --rc names; without a mount there, /tmp is its own.
"""

from __future__ import annotations

import os
import pwd
import re
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

URI = re.compile(r"(library|shub|docker|docker-archive|docker-daemon|oci|oci-archive|https?|oras|instance):")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def refuse(text: str, code: int) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(code)


def take(
    args: list[str], valued: dict[str, str], plain: set[str], usage: str, code: int
) -> tuple[dict[str, list[str]], list[str]]:
    """Options up to the first word that is none, and the rest. `valued` gives each spelling its name."""
    found: dict[str, list[str]] = {name: [] for name in valued.values()}
    while args and args[0].startswith("-"):
        word = args.pop(0)
        if word == "--":
            break
        name, equals, value = word.partition("=")
        if word in plain:
            continue
        if name not in valued:
            refuse(f"{usage}: unknown flag: {word}", code)
        if not equals:
            if not args:
                refuse(f"{usage}: flag needs an argument: {word}", code)
            value = args.pop(0)
        found[valued[name]].append(value)
    return found, args


def apptainer(args: list[str]) -> int:
    """`apptainer exec [options] IMAGE COMMAND ...`"""
    if not args or args.pop(0) != "exec":
        refuse("Error for command: only exec is here", 1)
    flags = {"--bind": "bind", "-B": "bind", "--pwd": "pwd", "--cwd": "pwd"}
    found, rest = take(args, flags, {"--nv", "--rocm"}, 'Error for command "exec"', 1)
    if len(rest) < 2:
        refuse(f'Error for command "exec": requires at least 2 arg(s), only received {len(rest)}', 1)
    image, command = rest[0], rest[1:]
    if URI.match(image):
        refuse(f"FATAL:   Unable to handle {image} uri: there is no network", 255)
    if not Path(image).exists():
        refuse(f"FATAL:   could not open image {Path(image).absolute()}: no such file or directory", 255)
    seen = [Path.cwd(), Path.home(), Path("/tmp")]
    for place in (place for bind in found["bind"] for place in bind.split(",")):
        source, _, target = place.partition(":")
        if not Path(source).exists():
            refuse(f"FATAL:   container creation failed: mount source {source} doesn't exist", 255)
        seen.append(Path(target.partition(":")[0] or source))
    folder = Path(found["pwd"][-1] if found["pwd"] else os.getcwd())
    if not folder.is_dir() or not any(folder.is_relative_to(place) for place in seen):
        refuse(f"FATAL:   chdir to {folder}: no such file or directory", 255)
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("APPTAINER_", "SINGULARITY_"))}
    ours |= {
        "PATH": PATH,
        "LD_LIBRARY_PATH": "/.singularity.d/libs",
        "APPTAINER_CONTAINER": str(Path(image).absolute()),
    }
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        if child is None:
            early.append(number)
        elif child.poll() is None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, pass_on)
    try:
        child = subprocess.Popen(command, cwd=folder, env=ours)
    except OSError as error:
        refuse(f'FATAL:   "{command[0]}": {error.strerror}', 255)
    for number in early:
        child.send_signal(number)
    code = child.wait()
    return 128 - code if code < 0 else code


def enroot(args: list[str]) -> NoReturn:
    """`enroot start [options] NAME|IMAGE [COMMAND ...]`"""
    if not args or args.pop(0) != "start":
        refuse("Usage: enroot start", 1)
    flags = {"--env": "env", "-e": "env", "--mount": "mount", "-m": "mount", "--rc": "rc", "--conf": "conf"}
    found, rest = take(args, flags, {"--root", "-r", "--rw", "-w"}, "Usage: enroot start", 1)
    if not rest:
        refuse("Usage: enroot start [options] [--] NAME|IMAGE [COMMAND] [ARG...]", 1)
    name, command = rest[0], rest[1:]
    data = Path(os.environ.get("ENROOT_DATA_PATH") or Path.home() / ".local/share/enroot")
    is_image = Path(name).is_file() and Path(name).read_bytes()[:4] == b"hsqs"
    if not is_image and "/" in name:
        refuse(f"[ERROR] Invalid argument: {name}", 1)
    if not is_image and not (data / name).is_dir():
        refuse(f"[ERROR] No such file or directory: {data / name}", 1)
    for mount in found["mount"]:
        if not re.fullmatch(r"[^\s]+(:[^\s]+)*", mount):
            refuse(f"[ERROR] Invalid argument: {mount}", 1)
        if not Path(mount.partition(":")[0]).exists():
            refuse(f"enroot-mount: failed to mount: {mount}: No such file or directory", 1)
    for variable in found["env"]:
        if not re.match(r"[A-Za-z_]\w*(=|$)", variable):
            refuse(f"[ERROR] Invalid argument: {variable}", 1)
    script = _script(found["rc"])
    lines = [] if is_image else (data / name / "etc/environment").read_text().splitlines()
    for variable in found["env"]:
        lines += (variable if "=" in variable else f"{variable}={os.environ.get(variable, '')}").splitlines()
    environment = dict(_formatted(lines))
    if not any((mount.split(":") * 2)[1] == "/tmp" for mount in found["mount"]):
        environment["TMPDIR"] = tempfile.mkdtemp()  # the real /tmp is a new one, each task's own
    os.chdir("/")
    login = os.environ.get("ENROOT_LOGIN_SHELL", "yes").lower() not in ("n", "no", "f", "false")
    if login:
        _log_in(environment)
    fd = os.memfd_create("rc", 0)
    os.write(fd, script)
    os.closerange(fd + 1, fd + 64)
    shell = environment.get("SHELL", "")
    shell = shell if shell and os.access(shell, os.X_OK) else "/bin/sh"
    os.execve(shell, ["-" * login + Path(shell).name, f"/proc/self/fd/{fd}", *command], environment)


def _log_in(environment: dict[str, str]) -> None:
    """What a login does: fills in what is missing, goes home or fails, and a profile sets PATH anew."""
    user = pwd.getpwuid(os.getuid())
    for variable, value in (("HOME", user.pw_dir), ("SHELL", user.pw_shell), ("USER", user.pw_name)):
        environment.setdefault(variable, value)
    environment["PATH"] = PATH
    try:
        os.chdir(environment["HOME"])
    except OSError:
        refuse(f"enroot-switchroot: failed to change directory: {environment['HOME']}: No such file or directory", 1)


def _script(given: list[str]) -> bytes:
    """What --rc names: a file or a pipe. Without it the image's own entrypoint, which runs nothing of ours."""
    if not given:
        return b"echo 'the entrypoint of the image' >&2; exit 1\n"
    path = Path(given[-1])
    if not path.exists() or not (path.is_file() or stat.S_ISFIFO(path.stat().st_mode)):
        refuse(f"[ERROR] No such file or directory: {path}", 1)
    return path.read_bytes()


def _formatted(lines: list[str]) -> list[tuple[str, str]]:
    """As enroot cleans its environment file: no line without a name, none of its own, and no surrounding quotes."""
    pairs = []
    for line in lines:
        found = re.fullmatch(r"\s*([A-Za-z_]\w*)=(.*)", line)
        if found and not found[1].startswith("ENROOT_"):
            pairs.append((found[1], re.sub(r"^[\"'](.*)[\"']\s*$", r"\1", found[2])))
    return pairs


if __name__ == "__main__":
    sys.exit({"apptainer": apptainer, "enroot": enroot}[sys.argv[1]](sys.argv[2:]))
