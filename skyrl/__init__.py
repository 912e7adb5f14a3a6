"""Reinforcement learning for language models: one program on every process, no controller."""

import os
import sys
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def _warn_of_namesakes() -> None:
    """PyPI's skyrl and skyrl-tx are the Ray-based SkyRL, whose files lie under the same import name as ours."""
    for other in ("skyrl", "skyrl-tx"):
        try:
            found = version(other)
        except PackageNotFoundError:
            continue
        print(
            f"skyrl: another project's package {other} {found} is installed in this environment and has the same "
            f"import name; one may run the other's code: pip uninstall {other}, or give each an environment of its own",
            file=sys.stderr,
        )


if os.environ.get("RANK", "0") == "0":
    _warn_of_namesakes()
