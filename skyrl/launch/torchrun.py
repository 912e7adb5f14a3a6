"""torchrun as `skyrl-tx launch` starts it: without its forty lines about a rank that has told why it ends."""

from __future__ import annotations

import logging
import sys


def main() -> None:
    """Runs torchrun's command line; its exit code is 1 when a rank has failed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    for name in ("multiprocessing.api", "agent.server.api", "multiprocessing.errors.error_handler"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        run()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if "message" not in (failure.error_file_data or {}):  # nothing was left by the rank itself
            what = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            print(f"skyrl: error: rank {rank} (process {failure.pid}) ended by {what}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
