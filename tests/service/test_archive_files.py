"""Download: a tar made as it is sent, files encrypted by age."""

import io
import sys
import tarfile

import pytest
import torch

from skyrl.service.storage.archive import META, Archive, TarStream, check_recipients
from skyrl.service.storage.content import Content
from skyrl.service.storage.records import CheckpointPath, ModelInfo
from skyrl.types import LoraSpec, UserError

PATH = CheckpointPath("s-1:train:0", "external_weights", "final")
CONTENT = Content(ModelInfo("base", LoraSpec(2)), {"q.A": torch.randn(2, 6), "q.B": torch.randn(4, 2)})


@pytest.mark.parametrize("sizes", [[], [0], [1, 511, 512, 513], [3_000_000, 7], [10240 - 1024], [10240]])
def test_a_tar_reads_back(tmp_path, sizes):
    files = {}
    for number, size in enumerate(sizes):
        name = f"{'long' * 40 if number else 'a'}{number}.bin"
        files[name] = tmp_path / name
        files[name].write_bytes(bytes(number + i % 251 for i in range(size)) if size < 10**4 else bytes(size))
    stream = TarStream(files)
    chunks = list(stream)
    data = b"".join(chunks)
    assert len(data) == stream.size and max(map(len, chunks), default=0) <= 1 << 20
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == list(files)
        for member in tar:
            assert tar.extractfile(member).read() == files[member.name].read_bytes()
            assert member.isreg() and member.mode == 0o644 and member.uid == 0


def test_a_tar_of_a_checkpoint_has_the_adapter_alone(tmp_path):
    archive = Archive(tmp_path)
    version, _ = archive.write(PATH, CONTENT)
    data = b"".join(archive.tar(PATH, version))
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as tar:
        tar.extractall(tmp_path / "out", filter="data")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(UserError, match="not on the disk"):
        archive.tar(PATH, "0123")
    archive.tar(PATH, version).close()


def test_encrypted_files_open_for_each_recipient_and_nobody_else(tmp_path):
    pyrage = pytest.importorskip("pyrage")
    archive = Archive(tmp_path)
    keys = [pyrage.x25519.Identity.generate() for _ in range(3)]
    version, size = archive.write(PATH, CONTENT, recipients=[str(key.to_public()) for key in keys[:2]])
    plain, _ = archive.write(PATH, CONTENT)
    files = archive.files(PATH, version)
    assert set(files) == {"adapter_config.json.age", "adapter_model.safetensors.age"}
    assert size == sum(file.stat().st_size for file in files.values())
    assert {p.name for p in archive.folder(PATH, version).iterdir()} == {*files, META}
    for name, file in archive.files(PATH, plain).items():
        secret = files[name + ".age"].read_bytes()
        assert file.read_bytes() not in secret
        for key in keys[:2]:
            assert pyrage.decrypt(secret, [key]) == file.read_bytes()
        with pytest.raises(pyrage.DecryptError):
            pyrage.decrypt(secret, keys[2:])
    with pytest.raises(UserError, match="encrypted for its recipients"):
        archive.read(PATH, version)


def test_keys_are_checked_before_anything_is_written(tmp_path):
    pyrage = pytest.importorskip("pyrage")
    good = str(pyrage.x25519.Identity.generate().to_public())
    check_recipients([good])
    check_recipients([])
    archive = Archive(tmp_path)
    secret = str(pyrage.x25519.Identity.generate())
    for bad in ("", "age1", good[:-1] + ("q" if good[-1] != "q" else "p"), secret, "ssh-ed25519 AAAA", "age1\n" * 99):
        with pytest.raises(UserError, match="not an X25519 public key") as caught:
            archive.write(PATH, CONTENT, recipients=[good, bad])
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyrage", None)
    with pytest.raises(UserError, match=r"pip install 'skyrl-spmd\[age\]'"):
        check_recipients(["age1x"])
    check_recipients([])
