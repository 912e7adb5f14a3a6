"""Folders of checkpoints: whole or not there, verified, replaced beside each other, never another store's."""

import os
import resource
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from skyrl.service.storage.archive import MARKER, META, Archive
from skyrl.service.storage.content import Content, OptimizerState
from skyrl.service.storage.records import CheckpointPath, ModelInfo
from skyrl.types import LoraSpec, UserError

PATH = CheckpointPath("s-1:train:0", "weights", "final")
INFO = ModelInfo("org/name", LoraSpec(2, seed=5))


def make_content(seed=0, dtype=torch.float32, optimizer=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    weights = {f"{path}.{side}": draw(*shape) for path in paths for side, shape in (("A", (2, 6)), ("B", (4, 2)))}
    state = OptimizerState(
        step=7,
        exp_avg={name: draw(3, dtype=torch.float32) for name in weights},
        exp_avg_sq={name: draw(3, dtype=torch.float32) for name in weights},
    )
    return Content(INFO, weights, state if optimizer else None)


def flat(content):
    out = dict(content.weights)
    if content.optimizer:
        for group in ("exp_avg", "exp_avg_sq"):
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
    return archive.write(path, content)[0]


def names(archive):
    return sorted(str(p.relative_to(archive.root)) for p in archive.root.rglob("*") if p.name != MARKER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_everything_comes_back_bit_for_bit(archive, dtype):
    content = make_content(dtype=dtype)
    version, size = archive.write(PATH, content)
    back = archive.read(PATH, version)
    assert same(back, content) and back.info == INFO
    folder = archive.folder(PATH, version)
    assert size == sum(file.stat().st_size for file in folder.iterdir() if file.name != META)
    assert archive.read(PATH, version, optimizer=False).optimizer is None
    assert set(os.listdir(folder)) == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "meta.json"
    }  # fmt: skip
    assert set(archive.files(PATH, version)) == {"adapter_config.json", "adapter_model.safetensors"}


def test_all_parameters(archive):
    whole = torch.randn(10)
    weights = {
        "model.a": torch.randn(3, 4).bfloat16(), "b": torch.randn(()), "turned": torch.randn(4, 6).T,
        "piece": whole[:5], "other piece": whole[5:], "again": whole[:5], "none": torch.zeros(0, 3),
    }  # fmt: skip
    content = Content(ModelInfo("org/name"), weights)
    version = save(archive, content)
    assert same(archive.read(PATH, version), content)
    assert set(archive.files(PATH, version)) == {"model.safetensors"}


def test_a_write_that_fails_leaves_nothing(archive):
    with pytest.raises(ZeroDivisionError):
        archive._write_files(PATH, INFO, None, lambda folder: 1 / 0)
    assert names(archive) == ["s-1:train:0", "s-1:train:0/weights"]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors", "adapter_config.json", META])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damage_is_told_by_file(archive, file, how):
    version = save(archive, make_content())
    path = archive.folder(PATH, version) / file
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2 if file != META else 0] ^= 1
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(UserError) as caught:
        archive.read(PATH, version)
    text = str(caught.value)
    assert PATH.uri in text and "\n" not in text and (file in text or how == "gone" and file == META)
    if how != "flipped":
        assert PATH.uri in archive.whole(PATH, version)
    if file == "optimizer.safetensors":
        assert same(archive.read(PATH, version, optimizer=False), make_content(optimizer=False))


def test_a_deleted_version_stays_while_it_is_read(archive):
    version = save(archive, make_content())
    stream = archive.tar(PATH, version)
    with archive.reading(PATH, version) as folder, archive.reading(PATH, version):
        archive.drop(PATH, version)
        assert (folder / META).is_file()
    assert not folder.parent.exists()
    assert len(b"".join(stream)) == stream.size  # opened before it was deleted
    archive.drop(PATH, version)  # once more is no error
    with pytest.raises(UserError, match="not on the disk"):
        archive.read(PATH, version)


def test_versions_come_and_go_beside_each_other(archive):
    """Threads that write and delete under one name: each finds what it wrote, and the last one leaves nothing."""
    errors = []

    def work(seed):
        try:
            content = make_content(seed)
            for _ in range(20):
                version = save(archive, content)
                assert same(archive.read(PATH, version), content)
                archive.drop(PATH, version)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and names(archive) == ["s-1:train:0", "s-1:train:0/weights"]


def test_cleaning_keeps_what_is_known_and_nothing_else(archive):
    kept = save(archive, make_content(1))
    other = CheckpointPath("s-2:train:0", "sampler_weights", "x")
    save(archive, make_content(2), other)
    save(archive, make_content(3))  # written, never committed
    kind = archive.folder(PATH, kept).parents[1]
    (kind / "final" / ".half.partial").mkdir()
    (kind / "final" / ".half.partial" / "half").write_text("x")
    (kind / "stranger").write_text("x")
    (kind / "link").symlink_to("final")
    lines = archive.clean({PATH: kept})
    assert same(archive.read(PATH, kept), make_content(1))
    assert os.listdir(kind) == ["final"] and os.listdir(kind / "final") == [kept]
    assert not (archive.root / "s-2:train:0").exists()
    assert len(lines) == 5 and all("never acknowledged" in line for line in lines)
    assert archive.clean({PATH: kept}) == []


def test_folders_of_earlier_servers_are_brought_to_their_place(archive):
    """Those had .v-<version> and a link with the checkpoint's name to it."""
    version = save(archive, make_content(1))
    kind = archive.folder(PATH, version).parents[1]

    def as_before():
        archive.folder(PATH, version).rename(kind / f".v-{version}")
        (kind / "final").rmdir()
        (kind / "final").symlink_to(f".v-{version}")
        (kind / ".v-older").mkdir()

    as_before()
    archive.adopt_links({PATH: version})
    assert same(archive.read(PATH, version), make_content(1))
    assert len(archive.clean({PATH: version})) == 1 and os.listdir(kind) == ["final"]
    as_before()
    (kind / "final").unlink()
    (kind / "final").mkdir()  # killed before the rename
    archive.adopt_links({PATH: version})
    archive.adopt_links({PATH: version})
    assert same(archive.read(PATH, version), make_content(1))


def test_a_folder_of_another_store_is_left_alone(tmp_path):
    first = Archive(tmp_path / "a")
    first.bind("1" * 32)
    with pytest.raises(UserError, match="another server uses it"):
        Archive(tmp_path / "a").bind("1" * 32)
    version = save(first, make_content())
    first.close()
    with pytest.raises(UserError, match="belong to another store"):
        Archive(tmp_path / "a").bind("2" * 32)
    again = Archive(tmp_path / "a")
    again.bind("1" * 32)
    assert same(again.read(PATH, version), make_content())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="another store .unknown"):
        Archive(tmp_path / "b").bind("1" * 32)


def test_a_disk_that_takes_no_more(archive, tmp_path):
    """A real refusal by the system: no file of this process may grow beyond a limit."""
    kept = save(archive, make_content(1))
    before = names(archive)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = Content(INFO, {"q.A": torch.zeros(2, 40_000), "q.B": torch.zeros(4, 2)})
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
