"""docs/papers.md names every registered piece, and every function and option it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from skyrl.algorithms import advantages, filters, kl, losses, objectives, reductions
from skyrl.config.options import parameters
from skyrl.config.schema import AlgorithmConfig

TEXT = (Path(__file__).parents[2] / "docs" / "papers.md").read_text()
REGISTRIES = [advantages.ADVANTAGES, losses.LOSSES, losses.CORRECTIONS, reductions.REDUCTIONS, kl.KL_ESTIMATORS]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda r: r.kind)
def test_every_registered_name_is_there(registry) -> None:
    assert registry.names()
    for name in registry.names():
        assert f"`{name}`" in TEXT or f'"{name}"' in TEXT, f"{registry.kind} {name} is not in docs/papers.md"


def test_the_row_of_a_declaration_names_its_paper_and_its_parameters() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("|")]
    for one in (*advantages.ADVANTAGES.things(), *losses.LOSSES.things()):
        (row,) = [line for line in rows if line.split("|")[-3].strip() == f"`{one.fn.__name__}`"]
        assert one.paper in row, one.name
        for param in one.params:
            assert f"params.{param}" in row or f"critic.{param}" in row, f"{one.name}: {param}"


def test_every_function_named_in_a_table_exists_and_names_its_source() -> None:
    modules = (advantages, losses, reductions, filters, objectives)
    named = re.findall(r"^\|[^|]+\|[^|]+\| `(\w+)` \|[^|]+\|$", TEXT, flags=re.M)  # third of four columns
    assert len(named) >= 20
    for name in named:
        (function,) = [getattr(module, name) for module in modules if hasattr(module, name)]
        if name not in ("no_correction", "cross_entropy"):
            assert "Source: " in function.__doc__, name


def test_every_option_of_the_combinations_exists() -> None:
    cfg = AlgorithmConfig()
    table = TEXT.split("## Common combinations")[1]
    options = re.findall(r"(\w+)\.([\w.]+)=(\S+?)[ `]", table)
    assert len(options) > 20
    for group, field, value in options:
        if field.startswith("params."):
            assert f"algorithm.{group}.{field}" in {option.path for option in parameters()}
            continue
        assert hasattr(getattr(cfg, group), field), f"{group}.{field}"
        if (group, field) in {("advantage", "name"), ("loss", "name"), ("loss", "reduction"), ("kl", "estimator")}:
            assert any(value in registry for registry in REGISTRIES), value
