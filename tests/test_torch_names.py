"""What skyrl takes from torch is there in the torch that runs this, also on paths that only a GPU goes: `make
test-oldest` asks the oldest release."""

import ast
import importlib
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# Where the code itself asks whether a name is there.
GUARDED = {
    ("skyrl/models/packed.py", "torch.nn.attention.varlen"),
    ("skyrl/planner/device.py", "torch._C._cuda_getArchFlags"),  # of builds for CUDA
}


def chain(node: ast.AST) -> str:
    """torch.a.b of an attribute's expression, "" of any other."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(["torch", *reversed(names)]) if isinstance(node, ast.Name) and node.id == "torch" and names else ""


def names_of(tree: ast.AST) -> set[str]:
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}  # parts of longer chains
    imports = any(
        alias.name == "torch" for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    )
    found = set()
    for node in ast.walk(tree):
        if imports and isinstance(node, ast.Attribute) and id(node) not in inner:
            found.add(chain(node))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("torch.")}
    return found - {""}


def exists(name: str) -> bool:
    there, path = torch, "torch"
    for part in name.split(".")[1:]:
        path += f".{part}"
        if not hasattr(there, part):
            try:
                importlib.import_module(path)
            except ImportError:
                return False
        there = getattr(there, part)
        if isinstance(there, torch.dtype | torch.Tensor) or there is torch.ops or there is torch.classes:
            return True
    return True


def test_every_name_of_torch_is_there():
    missing = set()
    for path in sorted((ROOT / "skyrl").rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for name in names_of(ast.parse(path.read_text(encoding="utf-8"))):
            if not exists(name) and not any(file == one and name.startswith(guarded) for one, guarded in GUARDED):
                missing.add((file, name))
    assert missing == set(), f"torch {torch.__version__} has no {sorted(missing)}"
