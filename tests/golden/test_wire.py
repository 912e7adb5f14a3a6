"""The server answers each of some 350 requests as it did when they were recorded: status, headers, body.

It is opened on a folder that the code before the restructuring left, whose checkpoints are read and trained on. What is
compared, and what is named instead since it differs from start to start, is in wire.py; the requests are in
exchanges.py. On another machine than that of the recording numbers agree to a tolerance, and digests are not compared.
"""

import shutil

from commands import SERVER, SERVER_FILES
from exchanges import exchange_all
from reading import HERE, fingerprint, read_record, same, shown
from wire import serving

DIGEST = "sha256 "


def differences(place, recorded, found, *, exact):
    """One line for each value that differs."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        for key in {**recorded, **found}:
            one, other = (part.get(key, "(absent)") for part in (recorded, found))
            yield from differences(f"{place}.{key}", one, other, exact=exact)
    elif isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        for number, (one, other) in enumerate(zip(recorded, found, strict=True)):
            yield from differences(f"{place}[{number}]", one, other, exact=exact)
    elif not exact and isinstance(recorded, str) and recorded.startswith(DIGEST):
        return
    elif not same(recorded, found, exact=exact):
        yield f"{place}: was {shown(recorded)}, is {shown(found)}"


def test_every_answer_is_as_recorded(starter, tmp_path):
    shutil.copytree(HERE / "state", tmp_path / "state", symlinks=True)
    for name, text in SERVER_FILES.items():
        (tmp_path / name).write_text(text)
    with serving(starter, tmp_path, *SERVER.split()) as wire:
        exchange_all(wire)
    record = read_record(HERE / "wire.json")
    exact = record["fingerprint"] == fingerprint()
    lines = []
    for number, (recorded, found) in enumerate(zip(record["exchanges"], wire.exchanges, strict=False)):
        lines += differences(f"{number}: {recorded['ask']}", recorded, found, exact=exact)
    assert not lines, "\n".join([f"{len(lines)} differences from the recorded answers", *lines[:60]])
    assert len(wire.exchanges) == len(record["exchanges"])
