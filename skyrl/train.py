"""RL: `python -m skyrl.train [option=value ...]`, or the same under torchrun. `--help` lists everything."""

from skyrl.main import run_entry


def main() -> None:
    run_entry("train")


if __name__ == "__main__":
    main()
