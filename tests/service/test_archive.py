"""Folders of checkpoints: whole or not there, verified, overwritten in one step, never another store's."""

import os
import resource
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from skyrl.service.archive import MARKER, META, Archive
from skyrl.service.archive_content import Content, OptimizerState
from skyrl.service.records import CheckpointPath, ModelInfo
from skyrl.types import LoraSpec, UserError

PATH = CheckpointPath("s-1:train:0", "weights", "final")
FACTS = ModelInfo("org/name", LoraSpec(2, seed=5))


def make_content(seed=0, dtype=torch.float32, optimizer=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    adapters = {f"model.layers.{i}.self_attn.q_proj": (draw(2, 6), draw(4, 2)) for i in range(2)}
    names = [f"{path}.{letter}" for path in adapters for letter in "AB"]
    state = OptimizerState(
        step=7,
        exp_avg={name: draw(3, dtype=torch.float32) for name in names},
        exp_avg_sq={name: draw(3, dtype=torch.float32) for name in names},
        master={name: draw(3, dtype=torch.float32) for name in names} if dtype == torch.bfloat16 else {},
    )
    return Content(FACTS, adapters=adapters, optimizer=state if optimizer else None)


def flat(content):
    out = {f"{p}.{x}": t for p, pair in content.adapters.items() for x, t in zip("AB", pair, strict=True)}
    out |= content.weights
    if content.optimizer:
        for group in ("exp_avg", "exp_avg_sq", "master"):
            out |= {f"{group}/{name}": t for name, t in getattr(content.optimizer, group).items()}
        out["step"] = torch.tensor(content.optimizer.step)
    return out


def same(left, right):
    left, right = flat(left), flat(right)
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


@pytest.fixture
def archive(tmp_path):
    archive = Archive(tmp_path / "root")
    archive.bind("0" * 32)
    yield archive
    archive.close()


def save(archive, content, path=PATH):
    version, _ = archive.write(path, content)
    archive.point(path, version)
    return version


def names(archive):
    return sorted(str(p.relative_to(archive.root)) for p in archive.root.rglob("*") if p.name != MARKER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_everything_comes_back_bit_for_bit(archive, dtype):
    content = make_content(dtype=dtype)
    version, size = archive.write(PATH, content)
    archive.point(PATH, version)
    for named in (None, version):
        back = archive.read(PATH, named)
        assert same(back, content) and back.facts == FACTS
    assert size == sum(f.stat().st_size for n, f in archive.files(PATH, private=True).items() if n != META)
    assert archive.read(PATH, optimizer=False).optimizer is None
    assert archive.folder(PATH).is_dir() and set(os.listdir(archive.folder(PATH))) == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "meta.json"
    }  # fmt: skip
    assert set(archive.files(PATH)) == {"adapter_config.json", "adapter_model.safetensors"}


def test_all_parameters(archive):
    whole = torch.randn(10)
    weights = {
        "model.a": torch.randn(3, 4).bfloat16(), "b": torch.randn(()), "turned": torch.randn(4, 6).T,
        "piece": whole[:5], "other piece": whole[5:], "again": whole[:5], "none": torch.zeros(0, 3),
    }  # fmt: skip
    content = Content(ModelInfo("org/name"), weights=weights)
    save(archive, content)
    assert same(archive.read(PATH), content)
    assert set(archive.files(PATH)) == {"model.safetensors"}


def test_content_that_fits_no_facts_is_a_mistake_of_ours(archive):
    for wrong in (
        Content(FACTS),
        Content(ModelInfo("base")),
        Content(FACTS, adapters={"q": (torch.zeros(3, 6), torch.zeros(4, 3))}),
        Content(FACTS, adapters={"q": (torch.zeros(2, 6), torch.zeros(2, 4))}),
    ):
        with pytest.raises(ValueError):
            archive.write(PATH, wrong)
    assert [n for n in names(archive) if "." in n] == []


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors", "adapter_config.json", META])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damage_is_told_by_file(archive, file, how):
    version = save(archive, make_content())
    path = archive.folder(PATH) / file
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2 if file != META else 0] ^= 1
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(UserError) as caught:
        archive.read(PATH)
    text = str(caught.value)
    assert PATH.uri in text and "\n" not in text and (file in text or how == "gone" and file == META)
    if how != "flipped":
        assert PATH.uri in archive.whole(PATH, version)
    if file == "optimizer.safetensors":
        assert same(archive.read(PATH, optimizer=False), make_content(optimizer=False))


def test_overwriting_moves_the_name_in_one_step(archive):
    old, new = make_content(1), make_content(2)
    first = save(archive, old)
    seen, errors, stop = set(), [], threading.Event()

    def look():
        try:
            while not stop.is_set():
                content = archive.read(PATH)
                seen.add(1 if same(content, old) else 2 if same(content, new) else 0)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    current = first
    for number in range(40):
        previous, current = current, save(archive, (old, new)[number % 2])
        archive.drop(PATH, previous)
    stop.set()
    thread.join()
    assert errors == [] and seen <= {1, 2} and seen
    assert same(archive.read(PATH, current), new)
    with pytest.raises(UserError, match="not on the disk"):
        archive.read(PATH, first)
    assert sorted(os.listdir(archive.folder(PATH).parent)) == sorted([f".v-{current}", "final"])


def test_a_deleted_checkpoint_stays_while_it_is_read(archive):
    version = save(archive, make_content())
    stream = archive.tar(PATH)
    with archive.reading(PATH) as folder:
        archive.drop(PATH, version)
        assert (folder / META).is_file() and not archive.folder(PATH).exists()
    assert not folder.exists()
    assert len(b"".join(stream)) == stream.size  # opened before it was deleted
    archive.drop(PATH, version)  # once more is no error


def test_cleaning_keeps_what_is_known_and_nothing_else(archive):
    kept = save(archive, make_content(1))
    other = CheckpointPath("s-2:train:0", "sampler_weights", "x")
    save(archive, make_content(2), other)
    newer, _ = archive.write(PATH, make_content(3))  # written, never committed
    parent = archive.folder(PATH).parent
    (parent / ".tmp-1").mkdir()
    (parent / ".tmp-1" / "half").write_text("x")
    (parent / ".link-1").symlink_to(".v-1")
    (parent / "stranger").write_text("x")
    archive.point(PATH, newer)  # as if killed between link and row
    lines = archive.clean({PATH: kept})
    assert same(archive.read(PATH), make_content(1)) and same(archive.read(PATH, kept), make_content(1))
    assert sorted(os.listdir(parent)) == sorted([f".v-{kept}", "final"])
    assert not (archive.root / "s-2:train:0").exists()
    assert len(lines) == 7 and any("stands for" in line for line in lines)
    assert archive.clean({PATH: kept}) == []


def test_cleaning_without_the_lock_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="before bind"):
        Archive(tmp_path).clean({})


def test_a_folder_of_another_store_is_left_alone(tmp_path):
    first = Archive(tmp_path / "a")
    first.bind("1" * 32)
    with pytest.raises(UserError, match="another server uses it"):
        Archive(tmp_path / "a").bind("1" * 32)
    save(first, make_content())
    first.close()
    with pytest.raises(UserError, match="belong to another store"):
        Archive(tmp_path / "a").bind("2" * 32)
    again = Archive(tmp_path / "a")
    again.bind("1" * 32)
    assert same(again.read(PATH), make_content())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="another store .unknown"):
        Archive(tmp_path / "b").bind("1" * 32)


def test_a_disk_that_takes_no_more(archive, tmp_path):
    """A real refusal by the system: no file of this process may grow beyond a limit."""
    kept = save(archive, make_content(1))
    before = names(archive)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = Content(FACTS, adapters={"q": (torch.zeros(2, 40_000), torch.zeros(4, 2))})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="cannot be written.*free space") as caught:
            archive.write(PATH, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert names(archive) == before and same(archive.read(PATH, kept), make_content(1))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be made"):
        Archive(tmp_path / "file" / "root")
    archive = Archive(tmp_path / "root")
    (archive.root / PATH.run_id).write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        archive.write(PATH, make_content())


def test_a_read_only_folder():
    with tempfile.TemporaryDirectory() as parent:  # pytest's own folders are closed to other users
        os.chmod(parent, 0o755)
        root = Path(parent) / "root"
        root.mkdir(mode=0o555)
        archive = Archive(root)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            with pytest.raises(UserError, match="Permission denied.*rights"):
                archive.write(PATH, make_content())
            with pytest.raises(UserError, match="Permission denied"):
                archive.bind("0" * 32)
        finally:
            os.seteuid(user)
        assert list(root.rglob("*")) == []
