"""Numbers at a port: those of a real run's rank and of the server are what the Grafana dashboard asks for."""

import json
import re
import socket
import sys
import urllib.request
from pathlib import Path

import pytest
from loop import run_loop
from prometheus_client.parser import text_string_to_metric_families

from skyrl.config.schema import RunConfig, TrackingConfig
from skyrl.run_dir import RunReader
from skyrl.service.scheduler import RequestScheduler
from skyrl.tracking import make_tracker
from skyrl.tracking.prometheus import PrometheusExporter, exposition, metric_name
from skyrl.tracking.system import SystemRecorder
from skyrl.types import UserError

DASHBOARD = Path(__file__).resolve().parents[2] / "launch" / "grafana" / "skyrl.json"
GPU = ("util", "memory_gib", "power_w", "temperature_c")


def read(text):
    """name -> (value, labels)"""
    families = text_string_to_metric_families(text.decode())
    return {one.name: (one.value, one.labels) for family in families for one in family.samples}


def test_a_port_answers_with_what_is_newest_and_is_given_back(tmp_path):
    cfg = RunConfig(tracking=TrackingConfig(console="off"))
    tracker = make_tracker(cfg, tmp_path, 0, recorder=SystemRecorder(tmp_path, 0))
    tracker.exporter = PrometheusExporter("127.0.0.1", 0, tracker.values, {"run": 'a "b"', "rank": "0"})
    url = f"http://127.0.0.1:{tracker.exporter._server.server_port}/metrics"
    port = tracker.exporter._server.server_port
    for step in (1, 2):
        tracker.add({"reward:mean": step / 4, "eval/accuracy:mean": float("nan")})
        tracker.finish_step(step, "rl")
        found = read(urllib.request.urlopen(url).read())
        assert (
            found["skyrl_reward_mean"] == (step / 4, {"run": 'a "b"', "rank": "0"}) and found["skyrl_step"][0] == step
        )
        assert found["skyrl_system_memory_gib"][0] > 0 and found["skyrl_eval_accuracy_mean"][0] != 0
    with pytest.raises(UserError, match=rf"tracking.prometheus_port={port}: cannot listen on 127.0.0.1 \("):
        PrometheusExporter("127.0.0.1", port, tracker.values, {})
    tracker.close()
    PrometheusExporter("127.0.0.1", port, tracker.values, {}).close()


def test_a_run_whose_port_is_taken_is_refused_before_its_first_step(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"tracking.prometheus_port={port}: cannot listen"):
            run_loop(tmp_path, f"tracking.prometheus_port={port}")
    assert RunReader(tmp_path).metrics()[0] == []


def test_the_dashboard_asks_for_what_runs_and_servers_tell(tmp_path):
    run_loop(tmp_path, "batch.num_steps=1")
    reader = RunReader(tmp_path)
    records, (line, *_) = reader.metrics()[0], reader.system(0)
    told = {key for record in records for key in record} | {f"system/{key}" for key in line}
    told |= {f"system/gpu/{key}" for key in GPU} | {"speed/mfu:mean"}  # where there is a GPU
    kinds = ("TrainRequest", "OptimStep", "SamplingRequest")
    told |= {*RequestScheduler().values(), *(f"requests/{kind}/done:total" for kind in kinds)}
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"skyrl_\w+", query)}
    assert asked <= {metric_name(key) for key in told} and len(asked) > 20
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_without_the_library_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UserError, match=r'tracking.prometheus_port=9100: .*pip install "skyrl-spmd\[prometheus\]"'):
        PrometheusExporter("127.0.0.1", 9100, dict, {})
    with pytest.raises(UserError, match="/metrics: needs prometheus-client"):
        exposition(dict, {})
