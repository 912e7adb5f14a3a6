"""What a metric is, in the sentences of docs/metrics.md, which ships with the package."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path


def explain(key: str) -> str:
    """What the metric `key` ("reward:mean", "eval/env/format:mean") is, as plain text; "" for one that no table of
    docs/metrics.md has."""
    rest = key.removeprefix("eval/")
    # Its own row first, then that of the same metric in training, then one with a gap that it fits: eval/<set>/...
    for name, gaps in ((key, False), (rest, True), (key, True)):
        for pattern, said in _rows():
            if (gaps or "+" not in pattern) and re.fullmatch(pattern, name):
                trained = said.replace("of training episodes", "of episodes")
                return f"of held-out prompts: {trained}" if name != key else trained if rest != key else said
    return "of held-out prompts" if rest != key else ""


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
