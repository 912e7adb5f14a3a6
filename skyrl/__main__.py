"""`python -m skyrl` is `skyrl-tx`."""

from skyrl.cli import main

if __name__ == "__main__":
    main()
