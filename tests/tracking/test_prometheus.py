"""Numbers at a port: those of a real run's rank and of the server are what the Grafana dashboard asks for."""

import contextlib
import json
import math
import re
import socket
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from loop import run_loop
from prometheus_client.parser import text_string_to_metric_families

from skyrl.config.schema import RunConfig, TrackingConfig
from skyrl.run_dir import RunReader
from skyrl.tracking import Tracker, make_tracker
from skyrl.tracking.prometheus import PrometheusExporter, exposition
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


EXPRESSION = re.compile(r"(?:rate\(|100 \* )?(skyrl_\w+)(?:\{(\w+)=~\"\$run\"\})?(?:\[5m\]\))?")


def scraped_while(url, work):
    """Does `work`; the last answer of `url` meanwhile."""
    answers, over = [], threading.Event()

    def scrape():
        while not over.wait(0.01):
            with contextlib.suppress(OSError):
                answers.append(read(urllib.request.urlopen(url).read()))

    thread = threading.Thread(target=scrape)
    thread.start()
    work()
    over.set()
    thread.join()
    return answers[-1]


def test_every_expression_of_the_grafana_dashboard_finds_something_of_a_real_run_or_server(tmp_path):
    from inprocess import ADAM, draw, open_client, prompt, rows  # skips where the client is not here

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = f"tracking.prometheus_port={port}", "tracking.peak_tflops=1", "run.name=mine", "eval.every_steps=1"
    told = scraped_while(f"http://127.0.0.1:{port}/metrics", lambda: run_loop(tmp_path / "run", *options))
    assert told["skyrl_step"] == (2.0, {"run": "mine", "rank": "0"})
    with open_client(tmp_path / "server") as client:
        model = client.create_lora_training_client("tiny", rank=4)
        model.forward_backward(rows(1), "cross_entropy").result()
        model.optim_step(ADAM).result()
        model.save_weights_and_get_sampling_client().sample(prompt(3, 4), 1, draw()).result()
        server = read(exposition(client.service.scheduler.values, {"model": "tiny"}))
    recorder = SystemRecorder(tmp_path, 0)
    recorder.last = {"gpus": [dict.fromkeys(GPU, 1.0)]}  # as a machine with one would have it
    gpu = read(exposition(Tracker([], recorder=recorder).values, {"run": "mine", "rank": "0"}))
    dashboard = json.loads(DASHBOARD.read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(targets) > 20
    for target in targets:
        name, label = EXPRESSION.fullmatch(target["expr"]).groups()
        found = [one[name] for one in (told, server, gpu) if name in one]
        assert found and math.isfinite(found[0][0]), target["expr"]
        labels = {label, *re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])} - {None}
        assert labels <= found[0][1].keys(), target
    asked = [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    assert asked == ["label_values(skyrl_step, run)"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_without_the_library_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UserError, match=r'tracking.prometheus_port=9100: .*pip install "skyrl-spmd\[prometheus\]"'):
        PrometheusExporter("127.0.0.1", 9100, dict, {})
    with pytest.raises(UserError, match="/metrics: needs prometheus-client"):
        exposition(dict, {})
