"""Evaluation alone: `python -m skyrl.evaluate model=... eval.sets=[...]`, or the same under torchrun."""

from skyrl.main import run_entry


def main() -> None:
    run_entry("evaluate")


if __name__ == "__main__":
    main()
