"""The Tinker server: `python -m skyrl.serve [option=value ...]`, or under torchrun. `--help` lists everything."""

import os
import signal
from types import FrameType

from skyrl.distributed import env
from skyrl.main import leave, run_entry


def main() -> None:
    leave_at_signals()
    run_entry("serve")


def leave_at_signals() -> None:
    """Until a server listens itself, SIGTERM and SIGINT end its ranks below torchrun at once, and that with them."""
    if env.ERROR_FILE not in os.environ or env.LAUNCHED in os.environ:
        return

    def leave(number: int, frame: FrameType | None) -> None:
        if os.environ.get("LOCAL_RANK") == "0":
            env.end_launcher()
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


if __name__ == "__main__":
    main()
    leave()
