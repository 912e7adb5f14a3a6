"""The Tinker server: `python -m skyrl.serve [option=value ...]`, or under torchrun. `--help` lists everything."""

from skyrl.distributed import env
from skyrl.main import leave, run_entry


def main() -> None:
    """Runs the command line."""
    env.leave_at_signals()
    run_entry("serve")


if __name__ == "__main__":
    main()
    leave()
