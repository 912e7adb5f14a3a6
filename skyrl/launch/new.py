"""`skyrl-tx new`: a piece of one's own, commented and running, with its test."""

from __future__ import annotations

import importlib.util
import keyword
from collections.abc import Sequence
from pathlib import Path

from skyrl.args import Parser, path_arg
from skyrl.files import write_atomic
from skyrl.types import UserError

TEMPLATES = Path(__file__).parent / "templates"
KINDS = sorted(path.stem for path in TEMPLATES.glob("*.txt") if not path.name.startswith("test_"))


def new(args: Sequence[str]) -> None:
    """Runs the command line: writes NAME.py and test_NAME.py, and says how to try and to train. Raises UserError."""
    p = Parser(prog="skyrl-tx new", description="Writes a commented piece of your own that runs, and its test.")
    p.add_argument("kind", choices=KINDS, help=f"one of: {', '.join(KINDS)}")
    p.add_argument("name", help="of the piece and of its file: small letters, digits and _")
    p.add_argument("--folder", type=path_arg, default=".", help="where it is written (here)")
    given = p.parse_args(list(args))
    name, folder = given.name, given.folder
    if not (name.isidentifier() and name.islower()) or keyword.iskeyword(name):
        raise UserError(f"new {given.kind} {name}: a name has small letters, digits and _, and begins with a letter")
    texts = {folder / f"{name}.py": given.kind, folder / f"test_{name}.py": f"test_{given.kind}"}
    for path in texts:
        if path.exists():
            raise UserError(f"new {given.kind} {name}: {path} is there already; choose another name")
    if importlib.util.find_spec(name) is not None:
        raise UserError(f"new {given.kind} {name}: a module of that name is installed; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    written = ""
    for path, template in texts.items():
        text = (TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")
        text = text.replace("my_name", name).replace("MyName", name.title().replace("_", ""))
        write_atomic(path, text.encode())
        written = written or text
    print(f"wrote {' and '.join(map(str, texts))}")
    print("\n".join(line for line in written.splitlines() if line.startswith(("Try it:", "Train it:"))))
    if importlib.util.find_spec("pytest") is None:  # which a run does not need
        print("pytest is not installed here: pip install pytest")
