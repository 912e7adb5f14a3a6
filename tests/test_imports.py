"""The shape of the code: who imports whom, what imports without torch, how long files and functions are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "skyrl").rglob("*.py"))

# A unit (folder or file below skyrl/) may import units of a smaller number, and itself. Within "1" the order is the
# decimals': options first, then what reads them.
LEVELS = {
    "types": 0,
    "files": 0.1,
    "kernels": 0.1,
    "registry": 0.1,
    "config": 1,
    "algorithms": 1.1,
    "envs": 1.1,
    "run_dir": 1.1,
    "data": 1.2,
    "tracking": 1.2,
    "planner": 2,
    "distributed": 2.1,
    "web": 2.1,
    "models": 3,
    "strategies": 4,
    "sampler": 4,
    "model": 5,
    "engine": 5.1,
    "checkpoint_folder": 6,
    "checkpoint": 6.1,
    "rollout": 6.1,
    "evaluate": 7,
    "weight_check": 7,
    "run": 7.1,
    "finish": 7.2,
    "trainers": 8,
    "service": 8,
    "sweep": 8.1,
    "main": 9,
    "tinker": 9.1,
    "launch": 9.1,
    "train": 9.2,
    "sft": 9.2,
    "serve": 9.2,
    "api": 9.2,
    "cli": 9.3,
}
WITHOUT_TORCH = tuple(
    f"skyrl.{name}"
    for name in "api cli config data distributed.env envs launch main planner registry run_dir sft sweep".split()
    + "tracking train types web".split()
)
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Modules of skyrl that a file imports anywhere, also inside functions. `from skyrl import x` counts as skyrl.x."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            if node.module == "skyrl":
                found |= {f"skyrl.{alias.name}" for alias in node.names}
            elif node.module:
                found.add(node.module)
    return {module for module in found if module.startswith("skyrl.")}


def test_imports_point_downwards():
    wrong = []
    for path in FILES:
        parts = name_of(path).split(".")
        if len(parts) == 1:
            continue  # skyrl/__init__.py itself
        assert parts[1] in LEVELS, f"skyrl.{parts[1]} has no place in LEVELS yet: give it one"
        for module in imported(path):
            target = module.split(".")[1]
            if target == "__version__" or target == parts[1]:
                continue
            assert target in LEVELS, f"{path}: imports {module}, which has no place in LEVELS"
            if LEVELS[target] >= LEVELS[parts[1]]:
                wrong.append(f"{name_of(path)} ({LEVELS[parts[1]]}) imports {module} ({LEVELS[target]})")
    assert wrong == []


def test_only_these_folders_use_collectives():
    """Everything else speaks to them, so that a branch before a collective is never hidden in a plugin."""
    allowed = ("skyrl.distributed", "skyrl.strategies", "skyrl.checkpoint", "skyrl.service")
    # Fills the local shard of a DTensor: looks at its placement, sends nothing.
    exceptions = {"skyrl.models.weights": "torch.distributed.tensor"}
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            for module in modules:
                inside = module == "torch.distributed" or module.startswith("torch.distributed.")
                excused = module.startswith(exceptions.get(name_of(path), "?"))
                if inside and not excused and not name_of(path).startswith(allowed):
                    wrong.append(f"{name_of(path)} imports {module}")
    assert wrong == []


def test_a_login_node_needs_no_torch():
    modules = [name_of(path) for path in FILES]
    modules = [m for m in modules if any(m == p or m.startswith(p + ".") for p in WITHOUT_TORCH)]
    assert len(modules) > 20
    code = (
        "import importlib, sys\n"
        "sys.modules['torch'] = None\n"
        f"for name in {modules!r}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ImportError as error:\n"
        "        print(name, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("folder", ["skyrl", "tests"])
def test_files_and_functions_are_short(folder):
    long = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        if lines > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert long == []


def test_every_module_says_what_it_is_for():
    silent = [name_of(p) for p in FILES if p.stat().st_size and not ast.get_docstring(ast.parse(p.read_text("utf-8")))]
    assert silent == []
