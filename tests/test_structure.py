"""The size of the code and its names: budgets that may only be lowered, lists of exceptions that may only shrink."""

import ast
import fnmatch
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "skyrl").rglob("*.py"))

# Lines of all files of skyrl/, and of each folder with what is below it: what one person can read. Where a folder is
# above FOLDER_LINES, its ceiling of today stands here; lower it with every commit that shortens it.
# service/ has room for a part that answers before the model is there.
TOTAL_LINES = 56_416
FOLDER_LINES = 3_000
LARGER_FOLDERS = {"service": 7_957}
# Python files side by side in one folder; where there are more, the ceiling of today.
FOLDER_FILES = 20
FULLER_FOLDERS: dict[str, int] = {}

# Class names that two modules or more define, so that a name alone does not tell what is meant.
TWICE: set[str] = set()


def lines_of(files: list[Path]) -> int:
    """Lines of files together, as `wc -l` counts them."""
    return sum(path.read_bytes().count(b"\n") for path in files)


def test_the_code_stays_within_its_budget():
    assert lines_of(FILES) <= TOTAL_LINES
    for folder in sorted(path for path in (ROOT / "skyrl").iterdir() if path.is_dir()):
        lines = lines_of(sorted(folder.rglob("*.py")))
        allowed = LARGER_FOLDERS.get(folder.name, FOLDER_LINES)
        assert lines <= allowed, f"skyrl/{folder.name} has {lines} lines, {allowed} are allowed"


def test_no_folder_is_crowded():
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in FILES)
    for folder, count in counts.items():
        allowed = FULLER_FOLDERS.get(folder, FOLDER_FILES)
        assert count <= allowed, f"{folder} has {count} Python files, {allowed} are allowed: divide it"
    done = {folder for folder in FULLER_FOLDERS if counts[folder] <= FOLDER_FILES}
    assert not done, f"take out of FULLER_FOLDERS: {done}"


def test_a_class_name_means_one_class():
    """Private classes stay within their module and may share a name."""
    modules: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                modules.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    twice = {name: places for name, places in modules.items() if len(places) > 1}
    new = {name: places for name, places in twice.items() if name not in TWICE}
    assert not new, f"these class names exist already: {new}"
    assert TWICE <= twice.keys(), f"take out of TWICE: {sorted(TWICE - twice.keys())}"


def test_docstrings_say_more_than_the_name():
    """One of one to three words says no more. Better none, or what a reader of the name does not know."""
    found: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
                text = ast.get_docstring(node)
                if text is not None and len(text.split()) <= 3:
                    found.setdefault(text, []).append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not found, f"leave these out, or say what the name does not: {found}"


def test_the_page_of_invariants_names_tests_that_exist():
    page = (ROOT / "docs" / "invariants.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)(?:::([\w*]+))?", page)
    assert len(named) > 40
    wrong = []
    for file, test in named:
        path = next((p for p in (ROOT / "tests" / file, ROOT / file) if p.exists()), None)
        tests = re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8")) if path else []
        if path is None or (test and not fnmatch.filter(tests, test)):
            wrong.append(f"{file}::{test}")
    assert wrong == []
