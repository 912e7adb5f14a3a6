"""A user's own code, imported before anything is built. No torch, unless a plugin brings it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from skyrl.args import expand_home
from skyrl.types import UserError


def import_plugins(plugins: Sequence[str]) -> None:
    """Imports what registers a user's own environments, rewards and losses: modules by their dotted names, files by
    their paths, and what installed packages name in their entry points "skyrl.plugins". Raises UserError."""
    for plugin in plugins:
        torch_distributed: Any = sys.modules.get("torch.distributed")
        alone = torch_distributed is None or not torch_distributed.is_initialized()
        try:
            _import_plugin(plugin)
            torch_distributed = sys.modules.get("torch.distributed")
            if alone and torch_distributed is not None and torch_distributed.is_initialized():
                raise UserError(
                    f"plugins=[{plugin}]: importing it starts a process group; leave init_process_group out, skyrl's "
                    "own comes after the plugins"
                )
        except UserError:
            raise
        except ModuleNotFoundError as error:
            raise UserError(
                f"plugins=[{plugin}]: no module {error.name!r}; give its dotted name, or the path of its file, and "
                "start where it is, or put its folder on PYTHONPATH"
            ) from error
        except Exception as error:  # whatever a user's module does when it is imported
            place: Any = traceback.extract_tb(error.__traceback__)[-1]
            place = error if isinstance(error, SyntaxError) else place  # else the place in Python's own importer
            what = " ".join(str(error).split())
            raise UserError(
                f"plugins=[{plugin}]: importing it raised {type(error).__name__}: {what} at {place.filename}:"
                f"{place.lineno}; fix it there"
            ) from error


def _import_plugin(plugin: str) -> None:
    where = f"plugins=[{plugin}]"
    if not plugin.endswith(".py"):
        points = [point for point in entry_points(group="skyrl.plugins") if point.name == plugin]
        if len(points) > 1:
            raise UserError(f"{where}: {len(points)} installed packages have a plugin of that name; uninstall one")
        points[0].load() if points else importlib.import_module(plugin)
        return
    file = Path(expand_home(plugin, "plugins")).absolute()
    if not file.is_file():
        raise UserError(f"{where}: no file {file}; give its path, or the dotted name of a module without .py")
    loaded = sys.modules.get(file.stem)
    if loaded is not None and Path(str(getattr(loaded, "__file__", ""))).resolve() != file.resolve():
        raise UserError(f"{where}: a module {file.stem!r} is loaded already, {loaded!r}; give the file another name")
    if loaded is None:
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        sys.modules[file.stem] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[file.stem]
            raise
