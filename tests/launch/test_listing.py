"""skyrl-tx list: names, whose they are, options."""

import json
import sys

import pytest

from skyrl.launch.listing import list_things
from skyrl.registry import Registry
from skyrl.types import UserError


def test_everything_is_listed_with_options_and_whose_it_is(tmp_path, capsys, monkeypatch):
    list_things([])  # which imports what registers things, before registries are exchanged
    assert "\npolicies\n" in capsys.readouterr().out
    for registry in Registry.all:
        monkeypatch.setattr(registry, "_things", dict(registry._things))
    plugin = tmp_path / "listed_plugin.py"
    plugin.write_text(
        "import skyrl\n@skyrl.register_environment('listed')\nclass Listed(skyrl.Environment):\n"
        "    'A game.'\n    def __init__(self, *, level: int = 3, file: str): pass\n"
        "@skyrl.register_loss('listed', params={'scale': skyrl.Param(2.0, 'Times')})\n"
        "def listed(outputs, rows, *, scale): pass\n"
    )
    list_things(["--json", "--plugin", str(plugin)])
    found = json.loads(capsys.readouterr().out)
    assert {"environments", "rewards", "policies", "losses", "advantages", "reductions"} <= found.keys()
    mine = next(one for one in found["environments"] if one["name"] == "listed")
    assert mine == {
        "name": "listed", "from": f"{plugin}:2", "about": "A game.", "options": {"level": "3", "file": "(needed)"}
    }  # fmt: skip
    loss = next(one for one in found["losses"] if one["name"] == "listed")
    assert loss["options"] == {"scale": 2.0} and loss["from"] == f"{plugin}:6"
    ppo = next(one for one in found["losses"] if one["name"] == "ppo")
    assert ppo["from"] == "skyrl" and ppo["options"]["clip_low"] == 0.2
    list_things(["rewards"])
    assert "  exact " in capsys.readouterr().out
    with pytest.raises(UserError, match="list reward: no such kind; choose one of: "):
        list_things(["reward"])


def test_policies_of_control_are_listed_with_their_options(capsys, monkeypatch):
    pytest.importorskip("skyrl.trainers.control", reason="the extra control is not installed", exc_type=ImportError)
    list_things(["policies"])
    listed = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines()[1:])
    assert listed["cnn"].split() == ["skyrl", "features=512", "channels=32"] and {"mlp", "recurrent"} <= listed.keys()
    monkeypatch.setitem(sys.modules, "skyrl.trainers.control", None)  # as without gymnasium
    list_things(["policies"])
    assert "install the extra with pip install 'skyrl-spmd[control]'" in capsys.readouterr().err
