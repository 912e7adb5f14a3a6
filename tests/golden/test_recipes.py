"""Six recipes compute what they computed when they were recorded: metrics, drawn tokens, weights, optimizer state.

On the machine and versions of the recording bit for bit; elsewhere the metrics alone, to a tolerance.
"""

import pytest
from commands import RECIPES
from reading import HERE, digest_differences, fingerprint, metric_differences, read_record, read_run


@pytest.fixture(scope="module")
def runs(starter, tmp_path_factory):
    """runs(name): the record of a recipe, run once, after the recipe that it needs."""
    work = tmp_path_factory.mktemp("recipes")
    done = {}

    def run(name):
        if name not in done:
            recipe = RECIPES[name]
            if recipe.needs:
                run(recipe.needs)
            starter.run(recipe.module, *recipe.options.split(), folder=work / name, ranks=recipe.ranks)
            done[name] = read_run(work / name / "run")
        return done[name]

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_computes_what_it_did(runs, name):
    recorded, found = read_record(HERE / "recipes" / f"{name}.json"), runs(name)
    exact = recorded["fingerprint"] == fingerprint()
    lines = metric_differences(recorded["metrics"], found["metrics"], exact=exact)
    if exact:
        lines += digest_differences(recorded["rollouts"], found["rollouts"], "rollouts of step")
        lines += digest_differences(recorded["weights"], found["weights"], "weights of")
    assert not lines, "\n".join([f"{len(lines)} differences from the recorded run", *lines[:40]])
    if not exact:
        pytest.skip("recorded on another machine: metrics agree to the tolerance, tokens and weights are not compared")
