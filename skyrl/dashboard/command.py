"""`skyrl-tx dashboard`: the web page over a folder of runs, alone or beside a run."""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

from skyrl.args import Parser, path_arg
from skyrl.config.load import as_overrides, load_config
from skyrl.files import user_folder
from skyrl.types import UserError
from skyrl.web.beside import BESIDE

DEMO = Path(__file__).parent / "demo"


def dashboard(args: list[str]) -> None:
    """Serves until SIGINT or SIGTERM, or beside a run until that ends. Raises UserError for a folder, an address or
    options that cannot be used."""
    p = Parser(prog="skyrl-tx dashboard", description="A web page over the runs of a folder; it never writes into one.")
    p.add_argument(
        "runs", nargs="?", type=path_arg, default=Path("runs"), help="folder of run folders, or a run (runs)"
    )
    p.add_argument("--host", help="address to listen on (127.0.0.1)")
    p.add_argument("--port", type=int, help="port (6007); 0 = any free one, which is printed")
    p.add_argument("--path-prefix", help="where it lies behind a reverse proxy, for example /skyrl")
    p.add_argument("--demo", action="store_true", help="opens small recorded runs that come with skyrl")
    p.add_argument(BESIDE, action="store_true", help="ends when the standard input does")
    p.add_argument("options", nargs="*", metavar="dashboard.option=value", help="see docs/options.md, dashboard")
    given = p.parse_intermixed_args(args)
    flags = {"host": given.host, "port": given.port, "path_prefix": given.path_prefix}
    if foreign := [word for word in given.options if not word.startswith("dashboard.") or "=" not in word]:
        raise UserError(f"dashboard: {foreign[0]}: give one folder, and options as dashboard.option=value")
    typed = [*as_overrides({key: value for key, value in flags.items() if value is not None}, "dashboard.")]
    settings = load_config(["dashboard.enabled=true", *given.options, *typed], mode="serve").dashboard
    runs, only = DEMO if given.demo else given.runs, None
    if not runs.is_dir():
        raise UserError(f"dashboard: no folder {runs} here; give the one that holds your runs, or try --demo")
    if any((runs / file).is_file() for file in ("metrics.jsonl", "config.yaml")):
        runs, only = runs.resolve().parent, runs.resolve().name

    from skyrl.dashboard.app import create_app
    from skyrl.dashboard.auth import Auth
    from skyrl.dashboard.index import RunIndex
    from skyrl.web.http import serve_in_thread

    settings = replace(settings, runs=str(runs.absolute()))
    auth, index = Auth(settings), RunIndex(runs, user_folder("XDG_CACHE_HOME", "~/.cache") / "dashboard", only=only)
    app, board = create_app(settings, auth, index)
    server = serve_in_thread(app, settings.host, settings.port, close=board.close, options="dashboard")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    if given.beside:
        os.nice(10)
        threading.Thread(target=_wait_for_end, args=(stopped,), daemon=True).start()
    index.start()
    print(auth.announce(server.url, into_log=given.beside), flush=True)
    while not stopped.wait(1.0):
        server.check()
    server.stop()
    index.close()


def _wait_for_end(stopped: threading.Event) -> None:
    sys.stdin.buffer.read()
    stopped.set()
