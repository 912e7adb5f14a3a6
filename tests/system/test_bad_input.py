"""What a person gets wrong: one line that says what to do, a code that is not 0, soon, and nothing saved is lost.

docs/errors.md has the table; a test here for each of its rows.
"""

import json
import os
import shutil
import subprocess

import pytest
from launcher import LETTERS, TINY, lines_in, when

from skyrl.checkpoint.folder import list_checkpoints

MODEL = [option for option in TINY if option.startswith("model.")]
OTHER_MODEL = [option for option in LETTERS if option not in MODEL]


def refused(done, *words, code=2):
    """Ended in time with that code and one line on standard error, which holds all words."""
    assert done.code == code, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("skyrl: error: "), done.stderr
    for word in words:
        assert word in done.stderr
    # On a machine that others use too, a process gets its share of the cores only.
    crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert done.seconds < 30 * crowd


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["optim.lrr=1"], ["optim.lrr: no such option; did you mean optim.lr?"]),
        (["optim.lr=fast"], ["optim.lr=fast: needs a value of type float"]),
        (
            ["algorithm.critic.lr=1"],
            ["algorithm.critic.lr=1.0: has an effect only with an advantage that has a critic"],
        ),
        (["sampler.top_k=1"], ["sampler.top_k=1: leaves one token to draw"]),
        (["batch.optim_steps_per_batch=3"], ["does not divide batch.prompts_per_step=4", "1, 2, 4"]),
        (["env.options.letters=1"], ["env.options.letters", "no such option", "trouble"]),
        (["env.name=nothing"], ["env.name", "nothing", "arithmetic"]),
        (["plugins=[nothing.here]"], ["plugins=[nothing.here]: no module 'nothing'", "PYTHONPATH"]),
        (["model.tiny.hidden_size=65536", "model.tiny.num_layers=200"], ["on each rank, there are", "fsdp"]),
        (["data.max_prompt_tokens=50", "env.options.trouble=long"], ["letters/train/7: 400 tokens", "=50"]),
        (["run.resume=nowhere/000009"], ["run.resume=nowhere/000009: no complete checkpoint there"]),
    ],
)
def test_an_option_that_cannot_be(warm, tmp_path, options, words):
    refused(warm.run(*LETTERS, *options, "run.dir=run", cwd=tmp_path), *words)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.ranks
def test_batch_and_strategy_that_do_not_fit_the_ranks(warm, tmp_path):
    done = warm.run(*LETTERS, "batch.prompts_per_step=1", "run.dir=run", cwd=tmp_path, ranks=2)
    refused(done, "batch.prompts_per_step=1: fewer than the 2 ranks", "give at least 2")
    done = warm.run(*LETTERS, "strategy.name=single", "run.dir=run", cwd=tmp_path, ranks=2)
    refused(done, "strategy.name=single: for one process, but there are 2")
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there(warm, tmp_path):
    done = warm.run(*OTHER_MODEL, "model.path=./nothing/here", "run.dir=run", cwd=tmp_path)
    refused(done, "model.path=./nothing/here: no such folder; give tiny, a folder in Hugging Face format or a hub name")
    assert not (tmp_path / "run").exists()


def test_a_data_row_without_its_field(warm, tmp_path):
    rows = [{"question": "1+1?", "answer": "#### 2"}, {"qestion": "2+2?", "answer": "#### 4"}]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["env.name=gsm8k", "data.path=train.jsonl", "run.dir=run"]
    refused(warm.run(*LETTERS, *options, cwd=tmp_path), "train.jsonl:2: field 'question' is missing", "qestion")
    assert not (tmp_path / "run").exists()


def test_a_prompt_longer_than_rows_may_be(warm, tmp_path):
    options = [option for option in LETTERS if not option.startswith("warmup.")]
    options += ["warmup.num_steps=0", "env.options.trouble=long", "batch.max_row_tokens=60", "run.dir=run"]
    refused(warm.run(*options, cwd=tmp_path), "prompt letters/train/7: 400 tokens, and rows of 60 must have room")


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("raise", ["raised KeyError: 'no such answer' at", "letters.py:"]),
        ("not_a_number", ["returned nan as reward, wanted a finite number"]),
        ("hang", ["took longer than env.timeout_seconds=1", "letters.py:"]),
        ("spin", ["took longer than env.timeout_seconds=1", "letters.py:"]),
    ],
)
def test_a_reward_that_fails(warm, tmp_path, trouble, words):
    options = [f"env.options.trouble={trouble}", "env.timeout_seconds=1", "run.dir=run"]
    done = warm.run(*LETTERS, *options, cwd=tmp_path)
    refused(done, "environment letters.step, prompt letters/train/", *words, "env.on_error=mask")
    assert [info.tag for info in list_checkpoints(tmp_path / "run" / "checkpoints")]  # the warm-up's


@pytest.mark.ranks
@pytest.mark.parametrize("trouble", ["raise", "hang"])
def test_a_reward_that_fails_on_one_rank_only(warm, tmp_path, trouble):
    options = [f"env.options.trouble={trouble}", "env.options.rank=1", "env.timeout_seconds=1", "run.dir=run"]
    refused(warm.run(*LETTERS, *options, cwd=tmp_path, ranks=2), "rank 1: environment letters.step, prompt letters/")


@pytest.mark.parametrize("trouble", ["raise", "not_a_number", "hang"])
def test_a_failing_reward_is_masked_and_counted(warm, tmp_path, trouble):
    options = [f"env.options.trouble={trouble}", "env.on_error=mask", "env.timeout_seconds=0.2", "run.dir=run"]
    done = warm.run(*LETTERS, *options, "batch.num_steps=2", cwd=tmp_path)
    assert done.code == 0 and done.stderr == "", done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    invalid = [json.loads(line).get("invalid:sum", 0.0) for line in lines]
    assert sum(invalid) > 0 and sum(invalid) % 4 == 0  # whole groups: every sample of that prompt fails


def test_a_reward_that_ends_its_process_is_masked_in_a_worker(warm, tmp_path):
    options = ["env.name=letters_apart", "env.options.trouble=die", "batch.num_steps=2", "run.dir=run"]
    done = warm.run(*LETTERS, *options, cwd=tmp_path)
    assert done.code == 0 and done.stderr == "", done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    masked = sum(line.get("workers/masked:sum", 0.0) for line in lines)
    assert masked > 0 and masked == sum(line.get("invalid:sum", 0.0) for line in lines)


@pytest.mark.parametrize(
    ("phase", "ranks"), [("warmup", 1), ("optim", 1), pytest.param("optim", 2, marks=pytest.mark.ranks)]
)
def test_numbers_that_are_not_finite(warm, tmp_path, phase, ranks):
    options = [option for option in LETTERS if not option.startswith(f"{phase}.lr")] + [f"{phase}.lr=1e30"]
    done = warm.run(*options, "run.dir=run", cwd=tmp_path, ranks=ranks)
    refused(done, "not finite", "learning rate", code=1)


# ---- folders and checkpoints ---------------------------------------------------------------------------------------


def test_options_that_changed(warm, cut, tmp_path):
    run = cut("000008")
    before = (run / "metrics.jsonl").read_bytes()
    done = warm.run(*LETTERS, "run.dir=run", "sampler.temperature=0.5", "env.max_turns=2", cwd=tmp_path)
    refused(done, "made with other options", "sampler.temperature: 1.0 -> 0.5", "env.max_turns: 1 -> 2", "run.name")
    done = warm.run(*LETTERS, "run.dir=run", "run.resume=never", cwd=tmp_path)
    refused(done, "run.resume=never", "holds the checkpoints of an earlier run", "another run.name")
    assert (run / "metrics.jsonl").read_bytes() == before and len(list_checkpoints(run / "checkpoints")) == 4


def flip_a_bit(checkpoint):
    path = next(checkpoint.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_a_bit_of_what_all_read(checkpoint):
    path = checkpoint / ".metadata"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(checkpoint):
    path = next(checkpoint.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_file(checkpoint):
    next(checkpoint.glob("*.distcp")).unlink()


def spoil_the_manifest(checkpoint):
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"position": ', '"position": 1'))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (flip_a_bit, "is damaged (its checksum differs)"),
        (flip_a_bit_of_what_all_read, "file .metadata is damaged (its checksum differs)"),
        (truncate, "bytes instead of"),
        (lose_a_file, "is missing"),
        (spoil_the_manifest, "manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint(warm, cut, tmp_path, harm, words):
    checkpoints = cut("000008") / "checkpoints"
    harm(checkpoints / "000008")
    ranks = 2 if harm in (flip_a_bit, flip_a_bit_of_what_all_read) else 1
    done = warm.run(*LETTERS, "run.dir=run", cwd=tmp_path, ranks=ranks)
    refused(done, "checkpoint run/checkpoints/000008", words, "give run.resume=run/checkpoints/000006")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["000002", "000004", "000006", "000008"]
    if harm in (flip_a_bit, spoil_the_manifest):  # the remedy works
        done = warm.run(*LETTERS, "run.dir=run", "run.resume=run/checkpoints/000006", cwd=tmp_path, ranks=ranks)
        assert done.code == 0 and lines_in(tmp_path / "run" / "metrics.jsonl") == 10, done.stderr


def test_a_half_written_checkpoint_is_not_one(warm, cut, tmp_path):
    checkpoints = cut("000008") / "checkpoints"
    (checkpoints / "000008" / "manifest.json").unlink()
    (checkpoints / "000008").rename(checkpoints / "000008.tmp-12345678")
    done = warm.run(*LETTERS, "run.dir=run", cwd=tmp_path)
    assert done.code == 0 and "removed 000008.tmp-12345678" in done.stdout and "000006: rl step 6" in done.stdout
    assert (checkpoints / "000010").is_dir() and lines_in(tmp_path / "run" / "metrics.jsonl") == 10


def test_two_runs_in_one_folder(warm, cut, tmp_path):
    """With a code after which a scheduler tries again: a file server keeps the lock of a lost node for minutes."""
    run = cut("000010")
    holder = subprocess.Popen(["flock", str(run / "lock"), "sleep", "60"])
    try:
        refused(warm.run(*LETTERS, "run.dir=run", cwd=tmp_path), "run.dir=run: in use by another run", code=1)
    finally:
        holder.kill()
        holder.wait()


# ---- disks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """disk(kilobytes): a folder with a file system of that size of its own."""
    made = []

    def mount(kilobytes, name="disk"):
        place = tmp_path / name
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("a small file system needs the right to mount one")
        made.append(place)
        return place

    yield mount
    for place in made:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.ranks
def test_a_disk_that_is_full_when_saving(warm, disk, tmp_path):
    place = disk(900)
    options = ["run.dir=disk/run", "tracking.rollouts_every=0"]
    done = warm.run(*LETTERS, *options, cwd=tmp_path, ranks=2)
    refused(done, "not saved", "No space left on device", "free some space", "the last complete checkpoint is")
    kept = list_checkpoints(place / "run" / "checkpoints")
    assert kept and kept[-1].tag in done.stderr
    assert [path.name for path in (place / "run" / "checkpoints").iterdir() if ".tmp-" in path.name] == []
    shutil.copytree(place / "run", tmp_path / "run")  # a bigger disk
    done = warm.run(*LETTERS, "run.dir=run", cwd=tmp_path, ranks=2)
    assert done.code == 0 and f"resuming from run/checkpoints/{kept[-1].tag}" in done.stdout
    assert lines_in(tmp_path / "run" / "metrics.jsonl") == 10


def test_a_disk_that_is_full_when_logging(warm, disk, tmp_path):
    place = disk(2000)
    metrics = place / "run" / "metrics.jsonl"

    def fill():
        if lines_in(metrics) >= 5 and not (place / "filler").exists():
            with open(place / "filler", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"0" * 4096)
                except OSError:
                    pass
        return False

    options = ["run.dir=disk/run", "tracking.rollouts_every=0", "checkpoint.every_steps=0", "env.options.sleep=0.03"]
    done = warm.run(*LETTERS, *options, cwd=tmp_path, kill=fill)
    refused(done, "metrics.jsonl: cannot be written (No space left on device; ", "free some space")
    (place / "filler").unlink()
    assert [info.tag for info in list_checkpoints(place / "run" / "checkpoints")] == ["000004"]
    done = warm.run(*LETTERS, *options, cwd=tmp_path)
    assert done.code == 0 and lines_in(metrics) == 10, done.stderr


@pytest.mark.ranks
def test_a_disk_that_is_full_when_exporting(warm, disk, cut, tmp_path):
    place = disk(2600)
    run = cut("000010")
    shutil.rmtree(run / "rollouts")
    shutil.copytree(run, place / "run")
    room = os.statvfs(place)
    (place / "filler").write_bytes(b"0" * (room.f_bavail * room.f_frsize - 30_000))
    done = warm.run(*LETTERS, "run.dir=disk/run", "checkpoint.export=true", cwd=tmp_path, ranks=2)
    refused(done, "export", "failed", "free space there")
    assert not (place / "run" / "export").exists() and len(list_checkpoints(place / "run" / "checkpoints")) == 5
    (place / "filler").unlink()
    done = warm.run(*LETTERS, "run.dir=disk/run", "checkpoint.export=true", cwd=tmp_path, ranks=2)
    assert done.code == 0 and (place / "run" / "export" / "model.safetensors").is_file(), done.stderr


@pytest.mark.ranks
def test_a_folder_that_cannot_be_written(warm, disk, tmp_path):
    place = disk(100)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    done = warm.run(*LETTERS, "run.dir=disk/run", cwd=tmp_path, ranks=2)
    refused(done, "run.dir=disk/run: cannot be used (Read-only file system", "make it writable")


# ---- ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.ranks
def test_a_rank_that_dies_is_named(warm, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    options = ["run.dir=run", "env.options.sleep=0.03"]
    done = warm.run(*LETTERS, *options, cwd=tmp_path, ranks=2, kill=when(lambda: lines_in(metrics) > 5), only=[1])
    refused(done, "rank 1 (process ", "ended without a message", "the last checkpoint", code=-9)
    assert list_checkpoints(tmp_path / "run" / "checkpoints")
    done = warm.run(*LETTERS, *options, cwd=tmp_path, ranks=2)
    assert done.code == 0 and lines_in(metrics) == 10
