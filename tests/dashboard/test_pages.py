"""Every page over runs as the real writers leave them, and over folders as they should not be."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest
from viewing import HTML, Anyone, add_rollouts, add_system, client_of, make_run, record

from skyrl.dashboard import board, columns, render
from skyrl.dashboard import index as index_module
from skyrl.dashboard.command import DEMO
from skyrl.dashboard.index import RunIndex
from skyrl.dashboard.series import wilson
from skyrl.run_dir import RunReader
from skyrl.tracking.metric_docs import explain

STATIC = render.HERE / "static"
UPLOT = {  # uplot 1.6.32 from npm: dist/uPlot.iife.min.js, dist/uPlot.min.css, LICENSE
    "uplot-1.6.32.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uplot-1.6.32.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "uplot-LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}
NAME = "a=1,b c&d\\e"  # a folder's name that has to be quoted


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run = make_run(folder, NAME, f"tracking.tags=['{'<b>tag</b>'}']")
    add_rollouts(run)
    add_system(run)
    (run / "crash-20260101-000000" / "stacks").mkdir(parents=True)
    (run / "crash-20260101-000000" / "report.txt").write_text(f"it ended {HTML}")
    (run / "slurm.out").write_text("x" * 600_000 + HTML)
    for seed in (1, 2):
        make_run(folder, f"low-{seed}", f"seed={seed}", "optim.lr=1e-5", slope=0.1 * seed)
    make_run(folder, "high-1", "seed=1", "optim.lr=1e-3", slope=0.4)
    return folder


@pytest.fixture(scope="module")
def client(runs):
    return client_of(RunIndex(runs))


def address(*parts, name=NAME) -> str:
    return "/".join(["/runs", quote(name, safe=""), *parts])


def episode_address(runs, dump, number) -> str:
    rank, start, _ = list(RunReader(runs / NAME).episodes(dump))[number]
    return address("rollouts", dump, str(rank), str(start))


def all_pages(runs) -> list[str]:
    episodes = [episode_address(runs, "000005", number) for number in range(4)]
    return [
        "/", "/?q=low&state=unfinished", "/compare", f"/compare?run={quote(NAME)}&run=low-1&by=runs", "/runs/nothing",
        *(address(*part.split("/")) for part in ("", "phases", "rollouts", "checkpoints", "config", "logs") if part),
        address(), address("rollouts?dump=all&order=best&flag=any"), address("config?with=low-1"),
        *episodes, f"{episodes[1]}?colour=advantage", f"{episodes[1]}?colour=none", address("pair?uid=p%3C1%3E"),
        address("logs", "slurm.out"), address("logs", "crash-20260101-000000", "report.txt"),
    ]  # fmt: skip


def test_every_page_answers_and_shows_markup_as_text_with_no_script_or_style_of_its_own(runs, client):
    marked = 0
    for page in all_pages(runs):
        answer = client.get(page)
        assert answer.status_code == (404 if page == "/runs/nothing" else 200), (page, answer.text)
        text = answer.text
        assert HTML not in text and "<b>tag" not in text and "<img" not in text, page
        assert re.findall(r"<script(?! defer src=\"/static/)|<style| style=|\son\w+=\"|javascript:", text) == [], page
        assert re.findall(r"https?://(?!www.w3.org)[^\"<]*", text) == [], page
        assert text.count("<h1") == 1 and '<main id="main"' in text, page
        marked += "&lt;script&gt;" in text
    assert marked >= 6


def test_nothing_writes_into_a_run(runs, client):
    def everything():
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in runs.rglob("*")
            if path.is_file()
        }

    before = everything()
    for page in all_pages(runs):
        client.get(page)
    assert everything() == before


def test_runs_are_searched_by_name_option_and_tag_and_filtered_by_state(client):
    def found(query):
        return re.findall(r'name="run" value="([^"]*)"', client.get(f"/?{query}").text)

    assert sorted(found("")) == sorted([NAME.replace("&", "&amp;"), "low-1", "low-2", "high-1"])
    assert found("q=lr%3D1e-3") == ["high-1"] and sorted(found("q=LOW")) == ["low-1", "low-2"]
    assert found("tag=%3Cb%3Etag%3C/b%3E") == [NAME.replace("&", "&amp;")] and found("state=running") == []
    assert "No run fits" in client.get("/?q=zzz").text and client.get("/?page=x").status_code == 400


def test_series_are_the_numbers_with_intervals_and_other_axes(client):
    told = client.get(address("series?key=reward:mean&key=eval/accuracy:mean&key=nothing:mean")).json()
    reward, accuracy, nothing = told["series"]
    assert reward["x"] == [1, 2, 3, 4, 5] and reward["y"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert reward["lo"] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4]) and reward["said"] == explain("reward:mean") != ""
    assert (accuracy["x"], accuracy["y"]) == ([5], [0.25])
    assert accuracy["lo"][0] == pytest.approx(0.17545, abs=1e-4) and accuracy["hi"][0] == pytest.approx(
        0.3430, abs=1e-4
    )
    assert nothing["x"] == []
    tokens = client.get(address("series?key=reward:mean&axis=tokens&least=150&most=250")).json()["series"][0]
    assert tokens["x"] == [100, 200, 300]  # those inside, and one more at each end
    assert client.get(address("series?key=reward:mean&axis=x")).status_code == 400
    system = client.get(address("series?key=system:1:gpu0/util&key=system:9:cpu&key=system:0:eth0/recv_bytes")).json()
    assert [(one["label"], one["y"][0]) for one in system["series"]] == [
        ("rank 1 gpu0/util", 51.0),
        ("rank 0 eth0/recv_bytes", 2.0),
    ]


def test_seeds_of_one_point_are_drawn_as_their_mean_and_spread(client):
    told = client.get("/compare/series?metric=reward:mean&run=low-1&run=low-2&run=high-1").json()["series"]
    low = next(one for one in told if one["label"] == "optim.lr=1e-5 (mean of 2)")
    assert low["y"] == pytest.approx([0.15, 0.3, 0.45, 0.6, 0.75])
    assert low["hi"][0] - low["y"][0] == pytest.approx(0.0707107, abs=1e-6)
    assert [one["label"] for one in told if one is not low] == ["optim.lr=1e-3"]
    hours = client.get("/compare/series?metric=reward:mean&run=low-1&run=low-2&axis=hours").json()["series"][0]
    assert hours["x"] == pytest.approx([n * 2 / 3600 for n in range(1, 6)]) and hours["y"] == low["y"]
    each = client.get("/compare/series?metric=reward:mean&by=runs").json()["series"]
    assert sorted(one["label"] for one in each) == sorted([NAME, "low-1", "low-2", "high-1"])
    page = client.get("/compare?run=low-1&run=high-1").text
    assert "<code>optim.lr</code>" in page and "<code>seed</code>" not in page


def test_the_interval_of_a_share_is_wilsons():
    lo, hi = wilson(*(board_value(value) for value in (0.5, 10.0)))
    assert (lo[0], hi[0]) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    lo, hi = wilson(*(board_value(value) for value in (0.0, 20.0)))
    assert (lo[0], hi[0]) == pytest.approx((0.0, 0.1611), abs=1e-4)


def board_value(value):
    import numpy as np

    return np.array([value])


def test_episodes_are_found_and_flagged_and_carry_their_advantage(runs, client):
    page = client.get(address("rollouts?dump=000005")).text
    assert page.count('<li><a href="') == 4 and "4 episodes" in page
    assert [page.count(f">{flag}</span>") for flag in ("truncation", "repetition", "reward hacking?")] == [1, 1, 1]
    assert page.count("advantage +1.00") == page.count("advantage -1.00") == 1  # the others were not trained on
    for query, count in (("least=0.5", 2), ("most=0", 2), ("uid=p2", 2), ("q=four+WORDS", 1), ("flag=truncation", 1)):
        assert f"<p>{count} episodes" in client.get(address(f"rollouts?dump=000005&{query}")).text, query
    assert "<p>12 episodes" in client.get(address("rollouts?dump=all")).text
    assert client.get(address("rollouts?dump=000099")).status_code == 404
    assert client.get(address("rollouts?least=x")).status_code == 400
    told = client.get(episode_address(runs, "000005", 3)).text
    spans = re.findall(r'<span class="(lp\d)" title="token (\d+), log-prob (-[\d.]+)', told)
    assert "".join(chr(int(token)) for _, token, _ in spans) == "four words are here"
    assert spans[0] == ("lp0", str(ord("f")), "-0.100") and spans[-1][0] == "lp3"
    assert client.get(address("rollouts", "000005", "0", "17")).status_code == 404
    pair = client.get(address("pair?uid=p%3C1%3E&a=000001&b=000005&j=1")).text
    assert pair.count("<article") == 2 and 'aria-label="000005"' in pair


def test_phases_are_drawn_up_to_a_clock_that_was_set(client):
    page = client.get(address("phases")).text
    assert page.count("<rect class=") == 2 * 2 * 3 + 0 and "rank 1, step 5: train, 5.000 s" in page
    assert "step 2:" not in page


def test_a_link_to_one_run_shows_that_run_alone(runs):
    client = client_of(RunIndex(runs), Anyone("link", "viewer", "low-1"))
    assert client.get("/", follow_redirects=False).headers["location"] == "/runs/low-1"
    assert client.get(address(name="low-1")).status_code == 200
    for page in (
        address(),
        "/compare",
        "/compare/series?metric=reward:mean",
        f"{address(name='low-1')}/config?with=low-2",
    ):
        assert client.get(page).status_code == 403, page
    page = client.get(f"{address(name='low-1')}/config").text
    assert "low-2" not in page and "high-1" not in client.get(address(name="low-1")).text


def test_a_prefix_stands_before_every_address(runs):
    client = client_of(RunIndex(runs), path_prefix="/x/y")
    page = client.get("/x/y/runs/low-1").text
    links = re.findall(r'(?:href|src|action|data-src|data-events|data-fragment)="(/[^"]*)"', page)
    assert len(links) > 15 and all(link.startswith("/x/y/") for link in links)
    assert client.get("/runs/low-1").status_code == 404 and client.get("/x/y/static/dashboard.js").status_code == 200


def test_folders_as_they_should_not_be(tmp_path):
    make_run(tmp_path, "torn")
    with open(tmp_path / "torn" / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 6, "rew')
    make_run(tmp_path, "damaged")
    with open(tmp_path / "damaged" / "metrics.jsonl", "a") as stream:
        stream.write("<b>no record\n" + json.dumps(record(7)) + "\n")
    make_run(tmp_path, "future")
    os.utime(tmp_path / "future" / "metrics.jsonl", (4e9, 4e9))  # a clock that was set back since
    (tmp_path / "no run").mkdir()
    (tmp_path / "a file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text(": {")
    (tmp_path / "big" / "rollouts").mkdir(parents=True)
    (tmp_path / "big" / "metrics.jsonl").write_text(json.dumps(record(1)) + "\n")
    turn = {"context_text": "q" * 2_000_000, "text": "a " * 2_000_000, "tokens": list(range(50_000)), "logprobs": []}
    lines = [json.dumps({"uid": "u", "reward": None, "turns": [turn]}), "torn", '{"turns": [{}]}', "[]"]
    (tmp_path / "big" / "rollouts" / "000001-r0.jsonl").write_text("\n".join(lines) + "\n")
    client = client_of(RunIndex(tmp_path))
    page = client.get("/").text
    assert sorted(re.findall(r'name="run" value="([^"]*)"', page)) == ["big", "damaged", "empty", "future", "torn"]
    assert "0s ago" in page and page.count("damaged</span>") == 1
    assert "line 1 after byte" in (told := client.get("/runs/damaged").text) and "not a record" in told
    assert client.get("/runs/torn/series?key=reward:mean").json()["series"][0]["x"] == [1, 2, 3, 4, 5]
    for name in ("no%20run", "a%20file", "%2e%2e%2fx", "empty%00"):
        assert client.get(f"/runs/{name}").status_code == 404, name
    assert "config.yaml is absent or cannot be read" in client.get("/runs/empty/config").text
    assert "No step has ended yet" in client.get("/runs/empty").text
    assert "2 episodes" in client.get("/runs/big/rollouts").text
    episode = client.get("/runs/big/rollouts/000001/0/0").text
    assert "characters before this are left out" in episode and len(episode) < 1_000_000
    for file in ("../torn/config.yaml", "metrics.jsonl", "/etc/passwd"):
        assert client.get(f"/runs/torn/logs/{quote(file, safe='')}").status_code == 404, file


def test_a_run_that_is_deleted_or_appears_is_noticed(tmp_path):
    make_run(tmp_path, "one")
    index = RunIndex(tmp_path)
    client = client_of(index)
    make_run(tmp_path, "two")
    shutil.rmtree(tmp_path / "one")
    assert client.get("/runs/one").status_code == 404
    for entry in index._scan():
        index._refresh(entry)
    assert re.findall(r'name="run" value="([^"]*)"', client.get("/").text) == ["two"]


def test_blocks_of_runs_that_are_gone_are_deleted_and_a_disk_that_is_away_deletes_none(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "BLOCK_ROWS", 2)
    runs, cache = tmp_path / "runs", tmp_path / "cache"
    for name in ("one", "two", "three"):
        make_run(runs, name)
    index = RunIndex(runs, cache)
    client = client_of(index)
    runs.rename(tmp_path / "away")
    assert len(index._scan()) == 3 and client.get("/runs/one").status_code == 404
    (tmp_path / "away").rename(runs)
    shutil.rmtree(runs / "one")
    assert len(index._scan()) == 2 and client.get("/runs/two").status_code == 200
    index.close()
    assert len([*cache.glob("*/*.f8")]) == 2
    shutil.rmtree(runs / "two")
    again = RunIndex(runs, cache)
    again.start()
    again.close()
    assert len([*cache.glob("*/*.f8")]) == 1


def test_the_index_survives_a_restart_and_two_at_once(tmp_path):
    runs, cache = tmp_path / "runs", tmp_path / "cache"
    make_run(runs, "one")
    first = RunIndex(runs, cache)
    client_of(first)
    second = RunIndex(runs, cache)  # meanwhile: it reads, and writes nothing
    assert client_of(second).get("/runs/one/series?key=reward:mean").json()["series"][0]["x"] == [1, 2, 3, 4, 5]
    second.close()
    first.close()
    again = RunIndex(runs, cache)
    (entry,) = again._scan()
    assert entry.about["last"]["step"] == 5 and entry.stamp == RunReader(runs / "one").stamp()
    again.close()
    (kept,) = cache.glob("*/index.json")
    kept.write_text('{"version": 1, "runs": {"one": {"metrics": {"blocks": 7}, "stamp": [1]')
    assert client_of(RunIndex(runs, cache)).get("/runs/one").status_code == 200


def test_libraries_are_what_npm_has(runs):
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in STATIC.glob("uplot*")}
    assert found == UPLOT and "MIT" in (STATIC / "uplot-LICENSE").read_text()
    assert len((STATIC / "dashboard.js").read_text().splitlines()) <= 500


def test_metrics_explain_themselves():
    assert explain("reward/format:mean").startswith("each named objective")
    assert explain("eval/env/format:mean").startswith("of held-out prompts: what the environment reports")
    assert explain("logprob_gap:max") == explain("logprob_gap:mean") != "" and explain("not/there") == ""
    page = (Path(board.__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows = [
        line.split(" | ")[0] for line in page.split("## Keys")[1].split("\n## ")[0].splitlines() if line[:3] == "| `"
    ]
    keys = [key for row in rows for key in re.findall(r"`([a-z_/]+:(?:mean|sum|max|min))`", row)]
    assert len(keys) > 60 and [key for key in keys if not explain(key)] == []
    run = RunReader(DEMO / "objectives-seed1")
    unknown = {key for line in run.metrics()[0] for key in line if not explain(key)}
    assert unknown == {"step", "phase"}


def test_the_demo_is_a_small_run_with_everything_to_see(tmp_path):
    shutil.copytree(DEMO, tmp_path / "demo")  # as it is shipped, but for its name
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 300_000
    client = client_of(RunIndex(tmp_path / "demo"))
    page = client.get("/runs/objectives-seed1").text
    for word in (
        "Objectives",
        "Held-out accuracy",
        "Multipliers",
        "CPU of the process",
        "Phases of the ranks",
        "finished",
    ):
        assert word in page, word
    told = client.get("/compare/series?metric=reward:mean&run=objectives-seed1&run=objectives-seed2").json()["series"]
    assert [one["label"].endswith("(mean of 2)") for one in told] == [True] and len(told[0]["x"]) >= 20
    for run in ("objectives-seed1", "guess_number-seed1"):
        reader = RunReader(DEMO / run)
        rank, start, one = next(reader.episodes(reader.dumps()[-1]))
        dump = reader.dumps()[-1]
        shown = client.get(f"/runs/{run}/rollouts/{dump}/{rank}/{start}").text
        assert f"<h2>{one['uid']}" in shown and 'class="lp' in shown
    assert shown.count('<section class="turn"') == len(one["turns"]) > 1
    rank, start, _ = next(reader.episodes("000016"))
    assert 'class="ad-1"' in client.get(f"/runs/{run}/rollouts/000016/{rank}/{start}?colour=advantage").text


def test_a_run_whose_files_nobody_foresaw_takes_no_other_with_it(tmp_path):
    """Each of these has ended the thread that reads all runs, or a page."""
    make_run(tmp_path, "good")
    lines = {
        "huge": '{"step": 1, "phase": "rl", "reward:mean": 1' + "0" * 400 + "}",
        "words": '{"step": 1, "phase": "rl", "reward:mean": "x", "list": [1], "none": null}',
        "surrogate": '{"step": 1, "phase": "rl", "x\\ud800:mean": 1}',
        "infinite": '{"step": 1, "phase": "rl", "reward:mean": "inf", "loss:sum": "-inf", "nll:mean": "nan"}',
        "nothing": "{}",
    }
    for name, line in lines.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(line + "\n")
    for name, config in {
        "tags": "tracking: {tags: 7}",
        "keys": "{1: 2, a: {2: 3}, b: x}",
        "list": "algorithm: []",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(config)
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\x1b[31m")
    (tmp_path / os.fsdecode(b"\xff\x1b[31m") / "metrics.jsonl").write_text(json.dumps(record(1)) + "\n")
    client = client_of(RunIndex(tmp_path))
    page = client.get("/")
    assert page.status_code == 200 and page.text.count('name="run" value="') == 10, page.text
    for name in ("good", *lines, "tags", "keys", "list"):
        for part in (
            "",
            "/config",
            "/logs",
            "/rollouts",
            "/checkpoints",
            "/phases",
            "/series?key=reward:mean&key=loss:sum",
        ):
            assert client.get(f"/runs/{name}{part}").status_code == 200, (name, part)
    assert (
        client.get("/compare").status_code == 200
        and client.get("/compare/series?metric=reward:mean").status_code == 200
    )


def test_files_that_go_while_a_page_is_made_are_a_page_too(tmp_path, monkeypatch):
    add_rollouts(make_run(tmp_path, "one"))
    client = client_of(RunIndex(tmp_path))
    monkeypatch.setattr(RunReader, "dumps", lambda self: os.listdir(self.path / "gone"))
    answer = client.get("/runs/one/rollouts")
    assert answer.status_code == 404 and "not there any more" in answer.text


def test_a_dump_that_is_played_again_is_read_again_though_it_is_as_long(tmp_path):
    run = make_run(tmp_path, "one")
    add_rollouts(run)
    client = client_of(RunIndex(tmp_path))
    page = client.get("/runs/one/rollouts?dump=000001&q=four").text
    path = run / "rollouts" / "000001-r0.jsonl"
    path.write_text(path.read_text().replace("four words", "five words"))
    os.utime(path, (1, 1))
    assert "<p>1 episodes" in page and "<p>0 episodes" in client.get("/runs/one/rollouts?dump=000001&q=four").text


def test_tokens_are_coloured_by_the_gap_between_sampler_and_trainer(tmp_path):
    run = make_run(tmp_path, "one")
    add_rollouts(run)
    reader = RunReader(run)
    rank, start, one = list(reader.episodes("000005"))[3]
    page = f"/runs/one/rollouts/000005/{rank}/{start}?colour=gap"
    client = client_of(RunIndex(tmp_path))
    assert "Nothing was kept" in client.get(page).text
    (turn,), text = one["turns"], "four words are here"
    assert turn["text"] == text
    gaps = [None, 0.0, 1e-3, -1e-2, 0.5, *[1e-4] * (len(text) - 5)]
    values = [None if gap is None else value - gap for value, gap in zip(turn["logprobs"], gaps, strict=True)]
    told = {"p2/1/0": {"first": len(turn["context"]) - 1, "logprobs": values}}
    (run / "rollouts" / "000005-r0.jsonl.trained").write_text(json.dumps(told))
    found = re.findall(r'<span class="lp(\d)" title="[^"]*by ([-+.\de]+)"', client.get(page).text)
    assert (
        [tone for tone, _ in found[:4]] == ["0", "2", "4", "6"]
        and found[2][1] == "-0.01"
        and len(found) == len(text) - 1
    )


def test_what_is_held_of_all_runs_is_bounded_and_counted(tmp_path, monkeypatch):
    for number in range(4):
        make_run(tmp_path / "runs", f"run{number}")
    index = RunIndex(tmp_path / "runs", tmp_path / "cache")
    client = client_of(index)
    one = index.entries()[0].metrics.memory
    assert index._held == sum(entry.metrics.memory for entry in index.entries()) == 4 * one > 0
    monkeypatch.setattr(index_module, "TAIL_BYTES", 2 * one)
    for name in ("run0", "run1", "run2", "run3"):  # what was looked at last stays in memory, the others are on disk
        told = client.get(f"/runs/{name}/series?key=reward:mean").json()
        assert told["series"][0]["x"] == [1, 2, 3, 4, 5]
    assert index._held == sum(entry.metrics.memory for entry in index.entries()) <= 2 * one
    index.close()
