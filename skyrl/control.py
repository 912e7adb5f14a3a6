"""Gymnasium environments: `python -m skyrl.control env=CartPole-v1 [option=value ...]`, or under torchrun."""

from skyrl.main import run_entry


def main() -> None:
    run_entry("control")


if __name__ == "__main__":
    main()
