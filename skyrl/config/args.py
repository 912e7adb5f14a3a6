"""Command lines of `skyrl-tx`: what is wrong with one is told in one line, as every other mistake is."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from skyrl.types import UserError


class Parser(argparse.ArgumentParser):
    """argparse that raises a UserError, and takes no abbreviations: a flag that comes later would change their meaning.
    `prog` is "skyrl-tx <command>"."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{self.prog.split()[-1]}: {message}; {self.prog} --help lists the flags")
