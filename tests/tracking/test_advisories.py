"""What a run says of itself: each rule on curves that call for it and on ones that do not, by name, in one line, once;
kept in the run folder, sent to a webhook and a command, which never hold a run up."""

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from loop import run_loop

from skyrl.algorithms.advantages import ADVANTAGES
from skyrl.config.schema import AlertsConfig, RunConfig
from skyrl.run_dir import RunReader
from skyrl.tracking.advisories import (
    CHECKS,
    EQUAL_STEPS,
    SILENT_STEPS,
    Advisories,
    Advisory,
    History,
    advise,
    rules,
    stop_times,
    warn_fallback,
)
from skyrl.tracking.alerts import Alerts
from skyrl.types import UserError

ROOT = Path(__file__).resolve().parents[2]


def step(episodes=8, invalid=0, equal=0, cut=0.25):
    return {
        "episodes:sum": float(episodes),
        "invalid:sum": float(invalid),
        "cut_by_length:mean": cut,
        "filters/groups:sum": 4.0,
        "filters/zero_variance_groups:sum": float(equal),
        "reward:mean": 0.0,
    }


def said(metrics, state=None):
    state = state or Advisories()
    return [found.name for number, one in enumerate(metrics, 1) for found in state.look(number, one)]


def test_equal_groups_are_told_once_and_only_in_a_row():
    assert said([step(equal=4)] * (EQUAL_STEPS - 1) + [step(equal=3)] + [step(equal=4)] * (EQUAL_STEPS - 1)) == []
    assert said([step(equal=4)] * 3 * EQUAL_STEPS) == ["all_groups_equal"]
    critic = Advisories()  # whose advantages are not of groups
    assert [line for n in range(9) for line in critic.look(n, step(equal=4), of_groups=False)] == []
    assert said([step()] * 9) == [] and said([{"loss:sum": 1.0}]) == []


def test_the_advantage_itself_says_whether_it_compares_the_samples_of_a_group():
    groups = {one.name for one in ADVANTAGES.things() if one.group}
    assert {"grpo", "dr_grpo", "rloo"} <= groups and not groups & {"gae", "reinforce++"}


def test_all_truncated_and_all_invalid_are_told_once():
    assert said([step(cut=1.0)] * 3) == ["all_truncated"]
    assert said([step(), step(invalid=8, equal=4), step(), step(invalid=8, equal=4)]) == ["all_invalid"]


def test_verifiers_that_never_work_end_the_run_and_an_outage_of_a_step_does_not():
    fresh = Advisories()
    fresh.look(1, step(invalid=8, equal=4))
    assert fresh.hopeless
    worked = Advisories()
    for number, one in enumerate([step(), step(invalid=8), step(), *[step(invalid=8)] * (SILENT_STEPS - 1)]):
        worked.look(number, one)
        assert not worked.hopeless
    worked.look(9, step(invalid=8))
    assert worked.hopeless
    again = Advisories(dict(worked.said), {**worked.lasted, "all_invalid": 0})  # as a checkpoint gives it back
    assert said([step(invalid=8)], again) == []


def curve(count, **values):
    """Records of a run; of each metric a number, or a function of the step's part of the run (0 to 1)."""
    noise = np.random.default_rng(0).normal(0, 0.01, count)
    records = []
    for n in range(count):
        record = {"step": n + 1, "phase": "rl", "reward:mean": 0.3 + 0.4 * n / count + noise[n], "accuracy:mean": 0.5}
        record |= {"entropy:mean": 1.0 - 0.6 * n / count, "logprob_gap:mean": 0.01 + noise[n] / 10}
        record |= {"cut_by_length:mean": 0.1, "episodes:sum": 64.0, "sampler/preemptions:sum": 1.0}
        record |= {"filters/groups:sum": 8.0, "filters/zero_variance_groups:sum": 3.0}
        if n % 10 == 9:
            record |= {"eval/accuracy:mean": 0.5 + 0.4 * n / count, "eval/episodes:sum": 256.0}
        given = {key: value(n / count) if callable(value) else value for key, value in values.items()}
        records.append(record | {key: value for key, value in given.items() if value is not None})
    return records


def names(records):
    return [found.name for found in advise(records)]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("stalled", {"reward:mean": lambda t: 0.5 if t < 0.5 else 0.499}),
        ("reward_collapse", {"reward:mean": lambda t: 0.4 if t < 0.8 else 0.1 - t}),
        ("entropy_collapse", {"entropy:mean": lambda t: 1.0 - 0.999 * t, "reward:mean": lambda t: min(0.5, 0.3 + t)}),
        ("logprob_gap_rising", {"logprob_gap:mean": lambda t: 0.01 + 0.1 * t}),
        ("truncation_rate", {"cut_by_length:mean": lambda t: 0.6 * t}),
        ("reward_up_evaluation_down", {"eval/accuracy:mean": lambda t: 0.8 - abs(t - 0.4) if int(t * 200) % 10 == 9
                                       else None}),
        ("low_mfu", {"speed/mfu:mean": 0.004}),
        ("sequences_preempted", {"sampler/preemptions:sum": 20.0}),
    ],
)  # fmt: skip
def test_a_curve_that_calls_for_a_rule_is_told_by_it_once(name, values):
    found = names(curve(200, **values))
    assert found.count(name) == 1 and set(found) <= {name, "stalled"}


def test_a_run_that_learns_is_told_nothing():
    assert names(curve(300, **{"speed/mfu:mean": 0.2})) == []
    solved = {"reward:mean": 0.95, "accuracy:mean": 0.95, "entropy:mean": lambda t: max(0.001, 1 - 3 * t)}
    assert names(curve(300, **solved)) == []  # it has learned all there is: no plateau, no collapse
    rare = np.random.default_rng(1)  # a reward now and then: ten steps without one are no collapse
    assert "reward_collapse" not in names(curve(300, **{"reward:mean": lambda t: float(rare.random() < 0.1)}))
    assert names(curve(9, **{"reward:mean": 0.0, "entropy:mean": 0.0, "cut_by_length:mean": 0.9})) == []


def test_what_is_no_metric_counts_too():
    history, state = History(), Advisories()
    history.facts = {"disk_free_gib": 20.0, "checkpoint_gib": 9.0}
    assert state.look_back(history) == []
    history.facts = {"disk_free_gib": 17.0, "checkpoint_gib": 9.0, "stops": [0.0, 10.0, 3600.0, 7000.0]}
    found = state.look_back(history)
    assert [one.name for one in found] == ["disk_nearly_full", "preempted_too_often"]
    assert "17.0 GiB" in found[0].text and "116 minutes" in found[1].text and state.look_back(history) == []
    stops = [{"reason": reason, "at": "2026-05-01T10:00:00+0200"} for reason in ("SIGTERM", "stop file", "deadline")]
    assert stop_times([*stops, {"reason": "SIGTERM"}]) == [1777622400.0, 1777622400.0]


def test_every_rule_has_its_words_and_the_page_tells_them():
    assert set(CHECKS) < set(rules()) and len(rules()) == len(CHECKS) + 3
    page = (ROOT / "docs" / "alerts.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.M))
    told = {name: " | ".join(rule.values()) for name, rule in rules().items()}
    assert rows == told, "docs/alerts.md: copy the rows from conf/advisories.yaml"


def test_a_real_run_keeps_what_it_says_and_says_it_once_when_it_goes_on(tmp_path, capsys):
    options = ["batch.num_steps=12", "sampler.max_new_tokens=2", "checkpoint.every_steps=4", "tracking.console=lines"]
    run_loop(tmp_path, *options, "alerts.command=[touch,{}]".format(tmp_path / "told"))
    reader = RunReader(tmp_path)
    first = reader.advisories()
    assert [one["name"] for one in first][:1] == ["all_truncated"] and "truncation_rate" in [o["name"] for o in first]
    assert capsys.readouterr().out.count("advisory all_truncated: ") == 1 and (tmp_path / "told").exists()
    records = reader.metrics()[0]
    assert {found.name for found in advise(records)} == {one["name"] for one in first}
    run_loop(tmp_path, *options[1:], "batch.num_steps=14")
    assert reader.advisories() == first and "advisory" not in capsys.readouterr().out


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.got.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def webhook():
    server = HTTPServer(("127.0.0.1", 0), Receiver)
    server.got, server.status = [], 200
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown(), server.server_close()


def alerts(folder, **options):
    return Alerts(RunConfig(alerts=AlertsConfig(**options)), folder)


ONE = Advisory("stalled", 7, "no higher", "read <b>rollouts</b> \u00e9")


def test_webhook_and_command_get_the_same_json(tmp_path, webhook, monkeypatch):
    monkeypatch.setenv("HOOK", f"http://127.0.0.1:{webhook.server_port}/secret")
    out = tmp_path / "got.json"
    command = [sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())", str(out)]
    one = alerts(tmp_path, webhook="env:HOOK", command=command)
    one.tell(ONE)
    one.close()
    (got,) = webhook.got
    assert json.loads(out.read_text()) == got and (got["name"], got["step"]) == ("stalled", 7)
    assert got["text"].endswith(ONE.line) and got["run"] == tmp_path.name
    assert RunReader(tmp_path).advisories() == [
        {"name": "stalled", "step": 7, "text": "no higher", "remedy": ONE.remedy}
    ]


def test_ways_that_fail_are_said_once_without_the_address_and_end_nothing(tmp_path, webhook, caplog):
    warn_fallback.cache_clear()
    webhook.status = 302
    url = f"http://127.0.0.1:{webhook.server_port}/secret"
    one = alerts(tmp_path, webhook=url, command=["/no/such/program"])
    one.tell(ONE), one.tell(ONE)
    one.close()
    lines = [record.getMessage() for record in caplog.records]
    assert len(webhook.got) == 2 and len(lines) == 2 and "alerts.webhook: failed (status 302)" in lines[0]
    assert "alerts.command: failed" in lines[1] and "secret" not in "".join(lines)


@pytest.mark.parametrize("url", ["http://example.com/x", "ftp://x", "env:NOT_THERE", "hooks", "http://[::1"])
def test_a_webhook_that_is_no_https_address_is_refused(tmp_path, url):
    with pytest.raises(UserError, match="alerts.webhook=.*https address"):
        alerts(tmp_path, webhook=url)
