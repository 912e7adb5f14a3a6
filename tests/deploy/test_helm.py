"""The Helm chart: linted, rendered for several values, valid for Kubernetes, the same text as was reviewed.

SKYRL_RECORD=1 writes the reviewed texts (helm/*.golden) anew.
"""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

chart = pytest.importorskip("helm_python.chart", reason="make test-deploy installs Helm")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "launch" / "helm"
CASES = sorted(path for path in (Path(__file__).parent / "helm").glob("*.yaml"))
OIDC = {"issuer": "https://id.example", "clientId": "skyrl", "viewerGroups": ["ml"]}
OURS = {"JobSet"}  # kinds that are no part of Kubernetes itself


def render(values, name="mine"):
    with chart.Chart.load(CHART) as loaded:
        merged = loaded.merge_values(values)
        loaded.validate_schema(merged)
        return {name: text for name, text in loaded.render(values=merged, name=name).items() if text.strip()}


def manifests(values):
    return [one for text in render(values).values() for one in yaml.safe_load_all(text) if one]


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_rendered_charts_are_valid_and_as_reviewed(case):
    values = yaml.safe_load(case.read_text())
    rendered = render(values)
    for manifest in manifests(values):
        if manifest["kind"] not in OURS:
            kubernetes_validate.validate(manifest, "1.29", strict=True)
    text = "".join(f"# {name}\n{body.strip()}\n" for name, body in sorted(rendered.items()))
    golden = case.with_suffix(".golden")
    if os.environ.get("SKYRL_RECORD"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_lint():
    for case in CASES:
        found = chart.lint(CHART, values=yaml.safe_load(case.read_text()), strict=True)
        assert found["errors"] == [] and {one["error"] for one in found["messages"]} <= {"icon is recommended"}, found


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": {"gpu": 8}}, "gpu"),
        ({"trian": {}}, "trian"),
        ({"train": {"nodes": 0}}, "nodes"),
        ({"train": {"options": ["run.dir=/tmp/x"]}}, "options"),
        ({"train": {"options": ["run.window=22:00-06:00"]}}, "options"),  # a pod would end and start again all day
        ({"train": {"options": ["--help"]}}, "options"),  # would print, and complete the job
        ({"serve": {"options": ["--help"]}}, "options"),
        ({"train": {"name": ".."}}, "name"),
        ({"train": {"gpus": "8"}}, "gpus"),
        ({"train": {"nodeSelector": {"gpu": True}}}, "nodeSelector"),
        ({"train": {"tolerations": ["gpu"]}}, "tolerations"),
        ({"train": {"resources": {"limits": {"memory": "64 GB"}}}}, "memory"),
        ({"env": {"MY VAR": "1"}}, "MY VAR"),
        ({"runs": {"path": "/tmp"}}, "path"),
        ({"volumes": [{"name": "runs", "claim": "c", "path": "/c"}]}, "volumes"),
        ({"train": {"offPeak": {"begin": "22:00"}}}, "begin"),
        ({"securityContext": {"runAsUser": 0}}, "runAsUser"),
        ({"serve": {"enabled": True}}, "serve.keysSecret: name a secret"),
        ({"train": {"nodes": 2}, "runs": {"accessMode": "ReadWriteOnce"}}, "accessMode=ReadWriteOnce: train.nodes=2"),
        ({"train": {"queue": "q", "offPeak": {"enabled": True}}}, "choose one"),
        ({"ingress": {"enabled": True}}, "nothing to reach"),
        ({"dashboard": {"enabled": True}}, "set dashboard.oidc.issuer, or dashboard.allowRemoteToken"),
        (
            {"dashboard": {"enabled": True, "oidc": {"clientId": "x"}, "allowRemoteToken": True}},
            "only with dashboard.oidc",
        ),
        ({"dashboard": {"enabled": True, "oidc": OIDC}}, "needs dashboard.publicUrl"),
        ({"dashboard": {"enabled": True, "oidc": OIDC, "allowRemoteToken": True}}, "choose one"),
        ({"dashboard": {"publicUrl": "http://runs.example"}}, "publicUrl"),
        ({"dashboard": {"oidc": {"isuer": "https://id.example"}}}, "isuer"),
        ({"dashboard": {"options": ["dashboard.oidc_issuer=https://id.example"]}}, "options"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_before_anything_starts(values, words):
    with pytest.raises(Exception, match=words):
        render(values)


@pytest.mark.parametrize(
    "more", [{"offPeak": {"enabled": True}}, {"queue": "q"}, {"offPeak": {"enabled": True}, "kind": "JobSet"}]
)
@pytest.mark.parametrize("suspended", [True, False])
def test_an_upgrade_leaves_it_to_the_window_and_the_queue_whether_the_job_runs(more, suspended, tmp_path):
    """Without a cluster `lookup` finds nothing, so what it would find is written in its place."""
    labels = '(dict "labels" (dict "kueue.x-k8s.io/queue-name" "q"))'
    live = f'(dict "metadata" {labels} "spec" (dict "suspend" {str(suspended).lower()}))'
    copied = Path(shutil.copytree(CHART, tmp_path / "chart"))
    helpers = copied / "templates" / "_helpers.tpl"
    text, count = re.subn(r"lookup \$api [^}]*? \$name", live, helpers.read_text())
    assert count == 1
    helpers.write_text(text)

    def suspend(of, **how):
        with chart.Chart.load(of) as loaded:
            rendered = loaded.render(values=loaded.merge_values({"train": more}), name="mine", **how)
        made = [one for text in rendered.values() for one in yaml.safe_load_all(text) if one]
        return [one["spec"]["suspend"] for one in made if one["kind"] in ("Job", "JobSet")]

    assert suspend(copied, is_upgrade=True) == [suspended]
    assert suspend(copied, is_install=True) == suspend(CHART, is_upgrade=True) == [True]


def containers(values, kind):
    (found,) = (one for one in manifests(values) if one["kind"] == kind)
    return found["spec"]["template"]["spec"]["containers"][0]


def test_the_commands_of_the_pods_are_ones_that_skyrl_takes():
    """What the pods run, through the same checks as on a command line."""
    from skyrl.config.load import load_config

    train = containers({"train": {"nodes": 2, "options": ["experiment=gsm8k", "data.path=/d.jsonl"]}}, "Job")
    assert train["command"][-2:] == ["-m", "skyrl.train"] and "--node-rank=$(JOB_COMPLETION_INDEX)" in train["command"]
    assert "--master-addr=mine-train-0.mine-train" in train["command"]
    cfg = load_config([*train["args"], "dry_run=true"], mode="train")
    assert cfg.run.dir == "/runs/run"
    serve = containers({"train": {"enabled": False}, "serve": {"enabled": True, "keysSecret": "k"}}, "Deployment")
    assert shlex.join(serve["command"]) == "skyrl-tx launch --nproc=1 -- serve"
    cfg = load_config(serve["args"], mode="serve")
    assert (cfg.service.folder, cfg.service.port) == ("/runs/tinker", 8000)


def test_the_dashboard_of_a_pod_takes_what_the_chart_gives_it():
    from skyrl.config.access import dashboard_problems
    from skyrl.config.load import load_config

    more = {
        "enabled": True,
        "publicUrl": "https://runs.example/ml/x",
        "oidc": {**OIDC, "adminGroups": ["ml leads", "b"]},
    }
    pod = containers({"train": {"enabled": False}, "dashboard": more}, "Deployment")
    told = {one.partition("=")[0].removeprefix("--"): one.partition("=")[2] for one in pod["command"][3:]}
    page = load_config([*pod["args"], f"dashboard.host={told['host']}", f"dashboard.port={told['port']}"]).dashboard
    assert list(dashboard_problems(page)) == []
    assert (page.path_prefix, page.viewer_groups, page.admin_groups) == ("/ml/x", ["ml"], ["ml leads", "b"])
    assert page.oidc_issuer == OIDC["issuer"] and page.oidc_client_secret_file == "" and not page.allow_remote_token


def test_stops_are_no_failures_and_mistakes_end_the_job():
    (job,) = (one for one in manifests({}) if one["kind"] == "Job")
    rules = job["spec"]["podFailurePolicy"]["rules"]
    codes = {code: rule["action"] for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]}
    from skyrl.distributed.stop import INTERRUPTED, TEMPORARY
    from skyrl.main import USAGE_ERROR

    assert codes == {TEMPORARY: "Ignore", USAGE_ERROR: "FailJob", INTERRUPTED: "FailJob"}
    pod = job["spec"]["template"]["spec"]
    grace = int(next(e["value"] for e in pod["containers"][0]["env"] if e["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"))
    assert 0 < grace < pod["terminationGracePeriodSeconds"]


def test_a_job_set_is_not_made_again_after_a_mistake_or_a_person_s_stop():
    """Without a rule a JobSet makes a failed job again, up to maxRestarts times, whatever has failed it."""
    (found,) = (one for one in manifests({"train": {"kind": "JobSet"}}) if one["kind"] == "JobSet")
    (rule,) = found["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_names_of_digits_stay_texts():
    """Kubernetes refuses a number where a name is due, and a release may be called 2026."""
    numbers = {"runs": {"claim": "1"}, "secrets": ["2"], "image": {"repository": "r", "pullSecrets": ["3"]}}
    numbers |= {"volumes": [{"name": "8", "claim": "4", "path": "/m"}], "train": {"queue": "5", "priorityClass": "6"}}
    numbers |= {"serve": {"enabled": True, "keysSecret": "7"}, "ingress": {"enabled": True, "serveHost": "9.example"}}
    numbers["runs"] = {"storageClass": "true"}
    for release in ("2026", "a.b"):
        for text in render(numbers, release).values():
            for one in yaml.safe_load_all(text):
                if one:
                    kubernetes_validate.validate(one, "1.29", strict=True)
                    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", one["metadata"]["name"])  # of a service


def test_large_numbers_of_a_values_file_stay_whole():
    """The JSON of a values file has one kind of number, which templates write as 1.00068e+09."""
    large = {"env": {"NCCL_BUFFSIZE": 8388608, "RATE": 0.5}, "securityContext": {"runAsUser": 1000680000}}
    (job,) = (one for one in manifests(large) if one["kind"] == "Job")
    pod = job["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == 1000680000 and pod["securityContext"]["fsGroup"] == 1000
    env = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
    assert (env["NCCL_BUFFSIZE"], env["RATE"]) == ("8388608", "0.5")
