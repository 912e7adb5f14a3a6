"""The Tinker server: `python -m skyrl.serve [option=value ...]`, or under torchrun. `--help` lists everything."""

from skyrl.main import run_entry


def main() -> None:
    """Runs the command line."""
    run_entry("serve")


if __name__ == "__main__":
    main()
