"""The shape of the code: who imports whom, what imports without torch, how long files and functions are."""

import ast
import re
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
    "args": 0.05,
    "files": 0.1,
    "hub": 0.2,
    "kernels": 0.1,
    "registry": 0.1,
    "answers": 0.1,
    "sandbox": 0.3,
    "config": 1,
    "algorithms": 0.2,
    "envs": 1.1,
    "tasks": 1.15,
    "judges": 1.15,
    "workers": 1.15,
    "run_dir": 1.1,
    "data": 1.2,
    "tracking": 1.2,
    "text": 1.3,
    "planner": 2,
    "distributed": 2.1,
    "web": 2.1,
    "models": 3,
    "pretrained": 3.1,
    "strategies": 4,
    "sampler": 4,
    "model": 5,
    "engine": 5.1,
    "checkpoint": 6,
    "rollout": 6.1,
    "evaluation": 6.2,
    "run": 7.1,
    "loop": 7.2,
    "feedback": 2.2,
    "service": 8,
    "trainers": 8.05,
    "sweep": 8.1,
    "main": 9,
    "dashboard": 9.05,
    "report": 9.05,
    "tinker": 9.1,
    "launch": 9.1,
    "train": 9.2,
    "evaluate": 9.2,
    "sft": 9.2,
    "control": 9.2,
    "serve": 9.2,
    "api": 9.2,
    "cli": 9.3,
    "__main__": 9.4,
}
WITHOUT_TORCH = tuple(
    f"skyrl.{name}"
    for name in "algorithms api args cli config data distributed.env distributed.network distributed.place envs".split()
    + "answers dashboard judges launch main planner registry run_dir sandbox".split()
    + "report.charts report.compare report.page report.show report.top".split()
    + "evaluate sft sweep tasks text tinker tracking train types web workers".split()
    + "service.frontend".split()  # answers before torch is there
)
# (file, module of a higher level that it imports by a string). May only shrink.
UPWARDS_BY_STRING: set[tuple[str, str]] = set()
# Files that import each other in a circle. May only shrink.
CYCLES = {
    frozenset(f"skyrl.tracking.{name}" for name in ("base", "console", "jsonl", "tensorboard", "wandb")),
}
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Modules of skyrl that a file imports anywhere, also inside functions and by a string. `from skyrl import x`
    counts as skyrl.x."""
    found = imported_by_string(path)
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


def imported_by_string(path: Path) -> set[str]:
    """Modules of skyrl that a file imports, or looks up among the imported ones, by a string.

    Where a file imports what a variable names, every whole name of a module in it counts, since a table of them is read
    so. A name that is put together from parts counts as "skyrl.*". Command lines such as `-m skyrl.train` start a
    process of their own and do not count.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    by_variable = False
    for node in ast.walk(tree):
        name: ast.expr | None = None
        if isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            if called.rpartition(".")[2] in ("import_module", "__import__") or called.endswith("sys.modules.get"):
                name = node.args[0]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("sys.modules"):
            name = node.slice
        if isinstance(name, ast.Constant):
            found.add(str(name.value))
        elif isinstance(name, ast.JoinedStr):
            found.add(ast.unparse(name).lstrip("f'\"").partition("{")[0] + "*")
        elif name is not None:
            by_variable = True
    if by_variable:
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str}
        found |= texts & {name_of(file) for file in FILES}
    return {module for module in found if module.startswith("skyrl.")}


def test_the_page_of_the_architecture_has_every_unit_once():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Folders")[2]
    cells = [line.split("|")[2] for line in page.splitlines() if re.match(r"\| \d \|", line)]
    units = [unit for cell in cells for unit in re.findall(r"`(\w+)`", cell)]
    assert sorted(units) == sorted(LEVELS.keys() - {"__main__"})


def test_imports_point_downwards():
    wrong, excused = [], set()
    for path in FILES:
        parts = name_of(path).split(".")
        if len(parts) == 1:
            continue  # skyrl/__init__.py itself
        assert parts[1] in LEVELS, f"skyrl.{parts[1]} has no place in LEVELS yet: give it one"
        for module in imported(path):
            target = module.split(".")[1]
            if target == "__version__" or target == parts[1]:
                continue
            if (name_of(path), module) in UPWARDS_BY_STRING:
                excused.add((name_of(path), module))
                continue
            assert target in LEVELS, f"{path}: imports {module}, which has no place in LEVELS"
            if LEVELS[target] >= LEVELS[parts[1]]:
                wrong.append(f"{name_of(path)} ({LEVELS[parts[1]]}) imports {module} ({LEVELS[target]})")
    assert wrong == []
    assert excused == UPWARDS_BY_STRING, "take out of UPWARDS_BY_STRING what is mended"


def test_files_import_each_other_in_one_direction():
    """Levels say it for folders; here it is asked of files, late imports inside functions included. What is imported
    for annotations alone, under TYPE_CHECKING, is no dependency."""
    cycles = {frozenset(group) for group in cyclic_groups({name_of(path): file_imports(path) for path in FILES})}
    for cycle in cycles:
        assert any(cycle <= known for known in CYCLES), f"these files import each other in a circle: {sorted(cycle)}"
    assert cycles == CYCLES, f"take out of CYCLES what is mended; left are {sorted(map(sorted, cycles))}"


def file_imports(path: Path) -> set[str]:
    """Files that a file imports, by their dotted names; `from skyrl.a import b` is skyrl.a.b where that is a file."""
    names, found = {name_of(file) for file in FILES}, set()
    left: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            left += node.orelse
            continue
        left += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole & names or {node.module}
    return found & names - {"skyrl", name_of(path)}


def cyclic_groups(edges: dict[str, set[str]]) -> list[set[str]]:
    """Groups of two or more nodes that all reach each other (Tarjan)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[set[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in edges[node]:
            if other not in order:
                visit(other)
            if other in stack:
                lowest[node] = min(lowest[node], lowest[other])
        if lowest[node] == order[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                groups.append(set(stack[at:]))
            del stack[at:]

    for node in edges:
        if node not in order:
            visit(node)
    return groups


def test_only_these_folders_use_collectives():
    """Everything else speaks to them, so that a branch before a collective is never hidden in a plugin."""
    allowed = ("skyrl.distributed", "skyrl.strategies", "skyrl.checkpoint", "skyrl.service")
    # Fills the local shard of a DTensor: looks at its placement, sends nothing.
    # Runs torchrun's command line, and is no rank.
    exceptions = {"skyrl.models.weights": "torch.distributed.tensor", "skyrl.launch.torchrun": "torch.distributed."}
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
