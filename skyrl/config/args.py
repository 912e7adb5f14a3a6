"""What a person types: command lines of `skyrl-tx`, whose mistakes are told in one line as all others are, and `~`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn

from skyrl.types import UserError


class Parser(argparse.ArgumentParser):
    """argparse that raises a UserError, and takes no abbreviations: a flag that comes later would change their meaning.
    `prog` is "skyrl-tx <command>"."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.split()[-1]}: {message}; {self.prog} --help lists the flags")


def expand_home(path: str, where: str) -> str:
    """`path` with the home folder in place of a leading `~` or `~user`; variables such as $HOME are left alone.

    Raises UserError, naming the option `where`, for a user that this machine does not know.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise UserError(f"{where}={path}: no home folder of {user[1:] or 'this user'} here; give the whole path")
    return expanded


def path_arg(text: str) -> Path:
    """The type of a flag or argument of Parser that is a path, its `~` expanded."""
    try:
        return Path(expand_home(text, "path"))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
