"""Batch jobs on a real Slurm: from sbatch to a finished run, stopped, preempted, cancelled, in arrays."""

import json
import re
import urllib.request
from datetime import datetime, timedelta

import pytest
from jobs import RUN, Job, address, command, numbers, steps, stops, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
SLOW = "env.options.sleep=0.05"


def test_two_nodes_compute_what_two_ranks_here_do(whole, tmp_path):
    done = command(
        *("python", "-m", "skyrl.cli", "launch", "--nproc", "2", "--", "train", *RUN, "run.dir=run"),
        cwd=tmp_path,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path / "run") == numbers(whole)


def test_a_signal_requeues_and_the_result_is_bit_equal(whole, tmp_path):
    run = tmp_path / "run"
    job = Job.submit(tmp_path, "train.sbatch", *RUN, SLOW, "run.dir=run", flags=("--nodes=2",))
    until(lambda: steps(run) >= 5, 120, job)
    job.signal()
    assert job.end() == "COMPLETED", job.text()
    assert job.fact("Restarts") == "1" and [stop["reason"] for stop in stops(run)] == ["SIGUSR1"]
    assert f"job {job.id} is queued again (1 of at most 50)" in job.text() and "resuming from" in job.text()
    assert numbers(run) == numbers(whole)


def test_a_window_of_the_day(whole, tmp_path):
    """One job is submitted before its window: it is held, released when the window begins, and completes. The other's
    window closes while it runs: it saves and is held until tomorrow; released early, it is held again."""
    now = datetime.now()
    (before := tmp_path / "before").mkdir()
    (during := tmp_path / "during").mkdir()
    begin = now + timedelta(seconds=75)
    window = f"run.window={begin:%H:%M:%S}-{begin + timedelta(hours=1):%H:%M:%S}"
    early = Job.submit(before, "train.sbatch", *RUN, window, "run.dir=run", flags=("--nodes=2",))
    window = f"run.window={now + timedelta(hours=1):%H:%M:%S}-{now + timedelta(seconds=60):%H:%M:%S}"
    options = (window, "run.save_margin_seconds=20", "env.options.sleep=2.5", "run.dir=run")
    late = Job.submit(during, "train.sbatch", *RUN, *options, flags=("--nodes=1",))
    until(lambda: "held until" in late.text() and late.state() == "PENDING", 150, late)
    held = "job_requeued_in_held_state"
    assert late.fact("Reason") == held and [stop["reason"] for stop in stops(during / "run")] == ["deadline"]
    done = steps(during / "run")
    other = re.search(r"when job (\d+) releases it", late.text())[1]
    assert command("scontrol", "update", f"jobid={other}", "StartTime=now", cwd=tmp_path).returncode == 0
    until(lambda: late.text().count("closed now; the same command goes on from") == 1, 150, late)
    until(lambda: late.state() == "PENDING" and late.fact("Reason") == held, 60, late)
    assert steps(during / "run") == done and late.text().count("held until") == 2
    assert early.end() == "COMPLETED", early.text()
    assert int(early.fact("Restarts")) == 1 and "closed now" in early.text()
    assert numbers(before / "run") == numbers(whole)


def test_the_time_limit_and_the_deadline_requeue(whole, tmp_path):
    """Slurm's own signal before its limit, which is lowered once the run is on its way, however long that took; and the
    run's deadline before Slurm's end of the job. Side by side."""
    kinds = {"SIGUSR1": ("--time=30", "--signal=USR1@100", "run.must_save_by=never", 1.2)}
    kinds["deadline"] = ("--time=3", "--signal=USR1@1", "run.save_margin_seconds=65", 2.5)
    jobs = {}
    for reason, (time, signal, option, sleep) in kinds.items():
        (place := tmp_path / reason).mkdir()
        options = (option, f"env.options.sleep={sleep}", "run.dir=run")
        jobs[reason] = Job.submit(place, "train.sbatch", *RUN, *options, flags=("--nodes=2", time, signal))
    job = jobs["SIGUSR1"]
    until(lambda: steps(job.place / "run") >= 5, 200, job)
    soon = int(job.fact("RunTime").split(":")[1]) + 1  # minutes
    for limit in (soon, 30):  # of the second start as well
        assert command("scontrol", "update", f"jobid={job.id}", f"timelimit={limit}", cwd=tmp_path).returncode == 0
        until(lambda: jobs["SIGUSR1"].fact("Restarts") == "1", 150, job)
    for reason, job in jobs.items():
        assert job.end(500) == "COMPLETED", job.text()
        assert int(job.fact("Restarts")) >= 1 and reason in {stop["reason"] for stop in stops(job.place / "run")}
        assert numbers(job.place / "run") == numbers(whole)
    assert {stop["reason"] for stop in stops(tmp_path / "SIGUSR1" / "run")} == {"SIGUSR1"}


def test_a_job_of_higher_priority_preempts(whole, tmp_path):
    run = tmp_path / "run"
    job = Job.submit(tmp_path, "train.sbatch", *RUN, "env.options.sleep=0.2", "run.dir=run", flags=("--nodes=2",))
    until(lambda: steps(run) >= 4, 120, job)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--time=2", "--wrap", "sleep 2"]
    assert command(*urgent, cwd=tmp_path).returncode == 0
    assert job.end() == "COMPLETED", job.text()
    assert int(job.fact("Restarts")) >= 1 and stops(run)[0]["reason"] == "SIGTERM"
    assert numbers(run) == numbers(whole)


def test_requeues_are_bounded(tmp_path):
    """Also with a signal that reaches the batch script itself, of those that batch systems send."""
    run = tmp_path / "run"
    job = Job.submit(tmp_path, "train.sbatch", *RUN, SLOW, "run.dir=run", SKYRL_MAX_REQUEUES="0")
    until(lambda: steps(run) >= 4, 120, job)
    assert command("scancel", "--full", "--signal=USR2", job.id, cwd=tmp_path).returncode == 0
    assert job.end() == "FAILED" and job.fact("ExitCode") == "75:0"
    assert "has been queued again 0 times" in job.text()


@pytest.mark.parametrize("signal", ["USR1", "TERM", "XCPU"])
def test_a_signal_before_the_ranks_start_requeues(tmp_path, signal):
    (tmp_path / "setup.sh").write_text("touch in-setup-$SLURM_RESTART_COUNT; sleep 60\n")
    job = Job.submit(tmp_path, "train.sbatch", *RUN, "run.dir=run", SKYRL_SETUP="setup.sh")
    until((tmp_path / "in-setup-").exists, 30, job)
    assert command("scancel", "--full", f"--signal={signal}", job.id, cwd=tmp_path).returncode == 0
    until(lambda: job.fact("Restarts") == "1", 30, job)
    assert "is queued again (1 of at most 50)" in job.text() and "srun" not in job.text()
    assert command("scancel", job.id, cwd=tmp_path).returncode == 0


def test_a_mistake_ends_the_job_in_one_line_and_is_not_tried_again(tmp_path):
    job = Job.submit(tmp_path, "train.sbatch", *RUN, "optim.lrr=1", flags=("--nodes=2",))
    assert job.end() == "FAILED" and job.fact("ExitCode") == "2:0" and job.fact("Restarts") == "0"
    told = [line for line in job.text().splitlines() if line.startswith("skyrl: error:")]
    assert told[0] == "skyrl: error: optim.lrr: no such option; did you mean optim.lr?"
    assert all(line.startswith("skyrl: error: rank 1: ") for line in told[1:])  # srun ends nobody for rank 0's sake


def test_a_node_that_never_comes_is_told_in_time(tmp_path):
    """Rank 1 waits at another port: the ranks cannot meet."""
    wrong = "[ $SLURM_PROCID = 1 ] && export MASTER_ADDR=127.0.0.1 MASTER_PORT=1; "
    wrong += 'exec python -m skyrl.launch.rank train "$@"'
    step = ["srun", "-N2", "-n2", "--wait=60", "bash", "-c", wrong, "bash", *RUN, "run.dir=run", "run.join_seconds=5"]
    done = command("salloc", "-N2", "-n2", "--time=5", *step, cwd=tmp_path, timeout=120)
    assert done.returncode != 0
    assert "ranks did not" in done.stderr and "run.join_seconds=5" in done.stderr


def test_an_array_runs_a_seed_in_each_task_and_a_stopped_one_leaves_the_others_alone(tmp_path):
    """One of the tasks, the last, has the array's own number, which to scontrol means all of them."""
    job = Job.submit(tmp_path, "train.sbatch", *RUN, "env.options.sleep=0.2", flags=("--array=1-3",))

    def found():
        return sorted(path.parent for path in (tmp_path / "runs").glob("*/metrics.jsonl"))

    until(lambda: len(found()) == 3 and steps(found()[2]) >= 4, 200, job)
    assert command("scancel", "--signal=USR1", f"{job.id}_3", cwd=tmp_path).returncode == 0
    until(lambda: command("squeue", "-h", "-j", job.id, cwd=tmp_path).stdout == "", 300)
    assert [len(stops(run)) for run in found()] == [0, 0, 1] and [steps(run) for run in found()] == [10, 10, 10]
    done = command("python", "-m", "skyrl.cli", "sweep-table", "--json", cwd=tmp_path)
    (point,) = json.loads(done.stdout)["points"]
    assert point["seeds"] == [1, 2, 3] and point["unfinished"] == []
    assert len(set(point["metrics"]["reward:mean"]["values"].values())) > 1


def test_srun_alone_starts_ranks(whole, tmp_path):
    step = ["srun", "-N2", "-n2", "--time=5", "python", "-m", "skyrl.train", *RUN, "run.dir=run"]
    done = command(*step, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path / "run") == numbers(whole)


def test_launch_inside_an_allocation(whole, tmp_path):
    step = ["python", "-m", "skyrl.cli", "launch", "--", "train", *RUN, "run.dir=run"]
    done = command("salloc", "-N2", "--ntasks-per-node=1", "--time=5", *step, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "launch: srun --kill-on-bad-exit=0" in done.stderr
    assert numbers(tmp_path / "run") == numbers(whole)


def test_doctor_compares_the_clocks_of_the_nodes(tmp_path):
    step = ["python", "-m", "skyrl.cli", "doctor", "--json"]
    done = command("salloc", "-N2", "--ntasks-per-node=1", "--time=5", *step, cwd=tmp_path, timeout=100)
    report = json.loads(done.stdout)
    found = {finding["check"]: finding for finding in report["findings"]}
    assert found["clocks"]["status"] == "ok" and "2 nodes" in found["clocks"]["seen"]
    assert found["slurm"]["status"] == "ok" and "job" in found["slurm"]["seen"] and report["seconds"] < 60


def test_a_server_is_queued_again_and_cancelled(tmp_path):
    options = [option for option in RUN if option.startswith("model.tiny.")]
    job = Job.submit(tmp_path, "serve.sbatch", *options, "service.allow_anonymous=true")
    where = tmp_path / f"skyrl-url-{job.id}"
    until(where.exists, 60, job)
    port = where.read_text().strip().rpartition(":")[2]
    url = f"{address(job.fact('NodeList'))}:{port}"

    def healthy():
        try:
            with urllib.request.urlopen(f"http://{url}/api/v1/healthz", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    until(healthy, 120, job)
    job.signal()
    until(lambda: job.fact("Restarts") == "1", 60, job)
    assert "is queued again" in job.text()
    until(lambda: job.state() == "RUNNING", 60, job)
    until(healthy, 120, job)
    assert command("scancel", job.id, cwd=tmp_path).returncode == 0
    assert job.end() == "CANCELLED" and job.fact("Restarts") == "1"
    assert not healthy()
