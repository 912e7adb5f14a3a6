"""Records the golden files anew: python tests/golden/record.py {recipes|checkpoints} [NAME ...]

Only for a change that is meant to change numbers, and said so in its commit: look at the difference that git shows
before it is committed. --code PATH runs the code of another checkout, for example of the commit before a change, to
record on a machine whose fingerprint differs from the recorded one; its options have to be called as in commands.py of
this one. The stored checkpoints stand for those that users
have: they are recorded anew by an old release only, never by the code that is to read them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(RECORDERS))
    parser.add_argument("names", nargs="*", help="of recipes; none = all")
    parser.add_argument("--code", help="folder of the checkout whose code runs; this one if it is left out")
    args = parser.parse_args()
    if args.code:
        os.environ["SKYRL_GOLDEN_CODE"] = str(Path(args.code).resolve())
    from starting import Starter

    starter = Starter()
    try:
        with tempfile.TemporaryDirectory() as work:
            RECORDERS[args.what](starter, Path(work), args.names)
    finally:
        starter.close()


def record_recipes(starter, work: Path, names: list[str]) -> None:
    """One file for each recipe."""
    from commands import RECIPES
    from reading import HERE, fingerprint, read_run, write_record

    for name, recipe in RECIPES.items():
        if names and name not in names and not any(RECIPES[other].needs == name for other in names):
            continue
        starter.run(recipe.module, *recipe.options.split(), folder=work / name, ranks=recipe.ranks)
        if not names or name in names:
            found = read_run(work / name / "run")
            write_record(HERE / "recipes" / f"{name}.json", {"fingerprint": fingerprint(), **found})


def record_checkpoints(starter, work: Path, names: list[str]) -> None:
    """A run folder as a kill after a checkpoint leaves it, and what the same command computes when it goes on."""
    from commands import CHECKPOINTS, SAVED_STEP
    from reading import HERE, fingerprint, read_run, write_record

    for name, options in CHECKPOINTS.items():
        if names and name not in names:
            continue
        starter.run("skyrl.train", *options.split(), folder=work / name)
        whole, stored = work / name / "run", HERE / "checkpoint" / name
        saved = {path: json.loads((path / "manifest.json").read_text()) for path in (whole / "checkpoints").iterdir()}
        path = next(p for p, m in saved.items() if m["state"]["phase"] == "rl" and m["step"] == SAVED_STEP)
        shutil.rmtree(stored, ignore_errors=True)
        shutil.copytree(path, stored / "checkpoints" / path.name)
        shutil.copy(whole / "config.yaml", stored)
        length = saved[path]["state"]["metrics_offset"]
        (stored / "metrics.jsonl").write_bytes((whole / "metrics.jsonl").read_bytes()[:length])
        shutil.copytree(stored, work / name / "again" / "run")
        starter.run("skyrl.train", *options.split(), folder=work / name / "again")
        found = read_run(work / name / "again" / "run")
        assert found["metrics"] == read_run(whole)["metrics"], f"{name}: going on is not as going through"
        write_record(HERE / "checkpoint" / f"{name}.json", {"fingerprint": fingerprint(), **found})


def record_state(starter, work: Path, names: list[str]) -> None:
    """The folder of a server with a trained model's checkpoints."""
    from commands import SERVER, SERVER_FILES
    from exchanges import save_state
    from reading import HERE
    from wire import serving

    for name, text in SERVER_FILES.items():
        (work / name).write_text(text)
    with serving(starter, work, *SERVER.split()) as wire:
        save_state(wire)
    shutil.rmtree(HERE / "state", ignore_errors=True)
    shutil.copytree(work / "state", HERE / "state", symlinks=True, ignore=shutil.ignore_patterns("tokenizer"))


def record_wire(starter, work: Path, names: list[str]) -> None:
    """Every exchange with a server that was opened on the stored folder."""
    from commands import SERVER, SERVER_FILES
    from exchanges import exchange_all
    from reading import HERE, fingerprint, write_record
    from wire import serving

    shutil.copytree(HERE / "state", work / "state", symlinks=True)
    for name, text in SERVER_FILES.items():
        (work / name).write_text(text)
    with serving(starter, work, *SERVER.split()) as wire:
        exchange_all(wire)
    write_record(HERE / "wire.json", {"fingerprint": fingerprint(), "exchanges": wire.exchanges})


RECORDERS = {
    "checkpoints": record_checkpoints,
    "recipes": record_recipes,
    "state": record_state,
    "wire": record_wire,
}

if __name__ == "__main__":
    main()
