"""`python -m skyrl.sandbox run FILE` runs a Python program in a sandbox; `levels` says what this machine allows."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from dataclasses import fields
from pathlib import Path

from skyrl.sandbox.api import LEVELS, Limits, Sandbox, SandboxError
from skyrl.types import UserError

EXIT_STATUS = {"timeout": 124, "memory": 137, "output": 122, "processes": 121, "disk": 123}
FAILED = 125  # the sandbox itself, or the command line


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: the program's own, 128 + signal, or one of EXIT_STATUS for a limit; 125 for ours."""
    parser = argparse.ArgumentParser("python -m skyrl.sandbox", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("levels", help="tries the levels of protection and says which work here")
    run = commands.add_parser("run", help="runs a program; its input and output are this command's")
    run.add_argument("file", help='a Python file, or "-" for one from the standard input')
    run.add_argument("arguments", nargs="*", help="what the program finds in sys.argv")
    run.add_argument(
        "--level", choices=LEVELS, help="the default is the best one that works; rlimits protects no files"
    )
    for one in fields(Limits):
        kind = int if isinstance(one.default, int) else float
        name = f"--{one.name.replace('_', '-')}"
        run.add_argument(name, type=kind, default=one.default, help=f"{one.default} unless given", metavar="N")
    given = parser.parse_args(arguments)
    try:
        return _levels() if given.command == "levels" else _run(given)
    except (UserError, SandboxError) as error:
        print(f"skyrl: error: {error}", file=sys.stderr)
        return FAILED


def _levels() -> int:
    for level in LEVELS[:2]:
        try:
            said = f"works ({Sandbox(level).level})"
        except UserError as error:
            said = str(error)
        print(f"{level:10}{said}")
    print("rlimits   asks for --level rlimits: no protection of files")
    return 0


def _run(given: argparse.Namespace) -> int:
    limits = Limits(**{one.name: getattr(given, one.name) for one in fields(Limits)})
    try:
        source = sys.stdin.read() if given.file == "-" else Path(given.file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{given.file}: cannot be read ({error}); give a Python file") from error
    stdin: bytes | int = b""
    if given.file != "-":
        stdin, writing = os.pipe()  # handed on as it comes: input that never ends must not keep the limits from acting
        threading.Thread(target=_hand_on, args=(writing,), daemon=True).start()
    result = Sandbox(given.level).run(source, stdin=stdin, arguments=given.arguments, limits=limits)
    sys.stdout.write(result.stdout)
    sys.stdout.flush()
    sys.stderr.write(result.stderr)
    code = result.exit_code
    print(
        f"sandbox: {result.status}{'' if code is None else f', exit code {code}'}, level {result.level}, "
        f"{result.cpu_seconds:.2f} s CPU, {result.wall_seconds:.2f} s, {result.peak_memory >> 20} MiB",
        file=sys.stderr,
    )
    return EXIT_STATUS[result.status] if code is None else 128 - code if code < 0 else code


def _hand_on(writing: int) -> None:
    with contextlib.suppress(OSError):  # the program does not read on, or there is no input
        while data := os.read(0, 1 << 16):
            os.write(writing, data)
    os.close(writing)


if __name__ == "__main__":
    sys.exit(main())
