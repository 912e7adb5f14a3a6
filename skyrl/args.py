"""What a person types: command lines of `skyrl-tx`, whose mistakes are told in one line as all others are, and their
help; `~`; and secrets, which are neither shown nor written down."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from skyrl.types import UserError

# In names of variables and of options of environments: HF_TOKEN, api_key, clientSecret, and not tokenizer.
SECRET = re.compile(r"(token|key|secret|passw(or)?d|passphrase|credential|jwt)s?(?![a-z])", re.IGNORECASE)
NEVER_PLAIN = re.compile("secret|pass|credential|jwt|api", re.IGNORECASE)
ENV_OPTIONS = "env.options"


class Parser(argparse.ArgumentParser):
    """argparse that raises a UserError, and takes no abbreviations: a flag that comes later would change their meaning.
    `prog` is "skyrl-tx <command>"."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.split()[-1]}: {message}; {self.prog} --help lists the flags")


def config_dir() -> Path:
    """The folder of YAML files: beside the modules in an installed wheel, at the root of the repository otherwise."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"no conf/config.yaml in {package} or {package.parent}; install skyrl again")


def help_of(name: str) -> str:
    """A text of conf/help.yaml."""
    return yaml.safe_load((config_dir() / "help.yaml").read_text(encoding="utf-8"))[name].rstrip()


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


def is_secret(name: str, value: Any = "?") -> bool:
    """Whether a variable or option of this name holds what is for nobody's eyes. Numbers are not, nor words and special
    tokens below a name that may also be a column's or a tokenizer's: answer_key=answer, stop_token=<|end|>."""
    plain = r"[-+.\de]*|true|false|null" + ("" if NEVER_PLAIN.search(name) else r"|[a-z_ ]+|<.*>")
    return SECRET.search(name) is not None and not re.fullmatch(plain, str(value), re.IGNORECASE)


def hide_secrets(value: Any, name: str = "") -> Any:
    """Options of an environment with a few characters of a digest in place of each text whose name, or that of what it
    lies in, says that it is secret: equal ones still look equal."""
    if isinstance(value, dict):
        return {key: hide_secrets(part, f"{name}.{key}") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(hide_secrets(part, name) for part in value)
    if not isinstance(value, str) or not is_secret(name, value):
        return value
    return f"(hidden {hashlib.sha256(value.encode('utf-8', 'replace')).hexdigest()[:6]})"


def hide_in_command(words: Sequence[str]) -> list[str]:
    """A command line without the secrets among its options of the environment, written as name=text or {name: text}."""
    out = []
    for word in words:
        name, equals, text = word.partition("=")
        if equals and ENV_OPTIONS in name:
            inside = rf"((?:{SECRET.pattern})[\w-]*['\"]?\s*:\s*)[^,}}\]]+"
            text = "(hidden)" if is_secret(name, text) else re.sub(inside, r"\1(hidden)", text, flags=re.IGNORECASE)
        out.append(f"{name}{equals}{text}")
    return out
