"""Records the golden files anew: python tests/golden/record.py recipes [NAME ...]

Only for a change that is meant to change numbers, and said so in its commit: look at the difference that git shows
before it is committed. --code PATH runs the code of another checkout, for example of the commit before a change, to
record on a machine whose fingerprint differs from the recorded one.
"""

from __future__ import annotations

import argparse
import os
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


RECORDERS = {"recipes": record_recipes}

if __name__ == "__main__":
    main()
