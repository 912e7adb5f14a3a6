"""What a metric is, in the sentences of docs/metrics.md, which ships with the package."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path


def explain(key: str) -> str:
    """What the metric `key` ("reward:mean", "eval/env/format:mean") is, as plain text; "" for one that no table of
    docs/metrics.md has."""
    held_out = key.startswith("eval/")
    for name in (key, key.removeprefix("eval/")) if held_out else (key,):
        for pattern, said in _rows():
            if re.fullmatch(pattern, name):
                said = said.replace("of training episodes", "of episodes") if held_out else said
                return f"of held-out prompts: {said}" if held_out and name != key else said
    return "of held-out prompts" if held_out else ""


@lru_cache(maxsize=1)
def _rows() -> list[tuple[str, str]]:
    """(regular expression of keys, explanation) of every row that names keys; whole names before those with a gap."""
    found: list[tuple[str, str]] = []
    for line in _page().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        names = re.findall(r"`([^`]+)`", cells[0]) if len(cells) == 2 else []
        base = ""
        for name in names:
            name = base + name if name.startswith(":") else name
            base = name.rpartition(":")[0]
            if name == "eval/...":
                continue  # what it says is said by `explain`
            pattern = re.sub(
                r"\\\.\\\.\\\.|<[a-z_]+>", lambda gap: "[^/:]+" if gap[0][0] == "<" else ".+", re.escape(name)
            )
            text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cells[1]).replace("`", "").replace("\\|", "|")
            found.append((pattern if ":" in name or name.endswith("...") else f"{pattern}:[a-z]+", text))
    return sorted(found, key=lambda row: "+" in row[0])


def _page() -> str:
    package = Path(__file__).resolve().parent.parent
    for path in (package / "docs" / "metrics.md", package.parent / "docs" / "metrics.md"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return ""
