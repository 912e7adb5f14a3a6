"""docs/papers.md is what docs/papers.py makes of the declarations, and every registered piece says where it is from."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from skyrl.algorithms import advantages, corrections, kl, losses, reductions
from skyrl.config.schema import AlgorithmConfig

PAGE = Path(__file__).parents[2] / "docs" / "papers.md"
MAKE = runpy.run_path(str(PAGE.with_suffix(".py")))
REGISTRIES = [advantages.ADVANTAGES, losses.LOSSES, corrections.CORRECTIONS, reductions.REDUCTIONS, kl.KL_ESTIMATORS]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == MAKE["page"](), "run: python docs/papers.py > docs/papers.md"


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda r: r.kind)
def test_every_piece_has_a_row_with_its_source(registry) -> None:
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert registry.names()
    for name in registry.names():
        (row,) = [row for row in rows if row[0] == f"| `{name}`" and len(row) > 3]
        assert len(row[1]) > 10, name
        paper = getattr(registry.get(name), "paper", "")
        assert row[2] != "-" or name == "none", f"{registry.kind} {name}: its docstring has no 'Source: '"
        assert paper in row[2], f"{name}: its source does not name arXiv {paper}"


def test_every_recipe_sets_options_that_exist() -> None:
    for name, given in MAKE["recipes"]().items():
        for group, values in given.items():
            for key in values:
                assert hasattr(getattr(AlgorithmConfig(), group), key), f"{name}: {group}.{key}"
        assert given["advantage"]["name"] in advantages.ADVANTAGES and given["loss"]["name"] in losses.LOSSES, name
