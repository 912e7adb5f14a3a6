"""Supervised training on an environment's own solutions: `python -m skyrl.sft [option=value ...]`."""

from skyrl.main import run_entry


def main() -> None:
    run_entry("sft")


if __name__ == "__main__":
    main()
