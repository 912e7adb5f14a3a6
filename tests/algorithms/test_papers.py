"""docs/papers.md names every registered piece, and every function and option it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from skyrl.algorithms import advantages, filters, kl, losses, reductions
from skyrl.config.schema import AlgorithmConfig

TEXT = (Path(__file__).parents[2] / "docs" / "papers.md").read_text()
REGISTRIES = [advantages.ADVANTAGES, losses.LOSSES, losses.CORRECTIONS, reductions.REDUCTIONS, kl.KL_ESTIMATORS]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda r: r.kind)
def test_every_registered_name_is_there(registry) -> None:
    assert registry.names()
    for name in registry.names():
        assert f"`{name}`" in TEXT or f'"{name}"' in TEXT, f"{registry.kind} {name} is not in docs/papers.md"


def test_every_function_named_in_a_table_exists_and_names_its_source() -> None:
    modules = (advantages, losses, reductions, filters)
    named = re.findall(r"^\|[^|]+\|[^|]+\| `(\w+)` \|[^|]+\|$", TEXT, flags=re.M)  # third of four columns
    assert len(named) >= 20
    for name in named:
        (function,) = [getattr(module, name) for module in modules if hasattr(module, name)]
        if name not in ("no_correction", "cross_entropy"):
            assert "Source: " in function.__doc__, name


def test_every_option_of_the_combinations_exists() -> None:
    cfg = AlgorithmConfig()
    table = TEXT.split("## Common combinations")[1]
    options = re.findall(r"(\w+)\.(\w+)=(\S+?)[ `]", table)
    assert len(options) > 20
    for group, field, value in options:
        assert hasattr(getattr(cfg, group), field), f"{group}.{field}"
        if (group, field) in {("advantage", "name"), ("loss", "name"), ("loss", "reduction"), ("kl", "estimator")}:
            assert any(value in registry for registry in REGISTRIES), value
