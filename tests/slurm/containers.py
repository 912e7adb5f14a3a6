"""Container programs and a tiny image for the tests of this folder.

SKYRL_TEST_PROGRAMS names a folder with real ones (apptainer, singularity, enroot); without it apptainer and enroot are
the stand-ins of stand_in.py. pyxis has no stand-in: it is tested where srun has its flags (SLURM_TEST_PLUGSTACK).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from jobs import ROOT, command

# The image holds nothing: these folders of the machine come into it.
FOLDERS = ("/usr", str(ROOT), sys.prefix, sys.base_prefix)
PATH = "/opt/image/bin:/usr/bin:/bin"  # the image's own
ENROOT = {"DATA": "", "RUNTIME": "run", "CACHE": "cache"}


@dataclass
class Box:
    """A container program, ready for a job."""

    folder: Path  # where the program is: to be put on PATH
    image: str  # for SKYRL_CONTAINER
    real: bool
    env: dict[str, str]


def box(program: str, place: Path) -> Box:
    """The program and an image for it below `place`; skips the test where neither the real one nor a stand-in is."""
    real = _program(program, place / "bin")
    env = {}
    if program in ("apptainer", "singularity"):
        image = place / "tiny.sif"  # a folder is an image, too, whatever its name
        env["SKYRL_CONTAINER_ARGS"] = " ".join(f"--bind {folder}" for folder in FOLDERS)
        name = str(image)
    else:
        image = place / "enroot" / "tiny"
        env = {f"ENROOT_{kind}_PATH": str(place / "enroot" / folder) for kind, folder in ENROOT.items()}
        env["SKYRL_CONTAINER_ARGS"] = " ".join(f"--mount {folder}:{folder}" for folder in FOLDERS[1:])
        name = "tiny"  # a container, which has a name and no path
    skeleton(image)
    if program == "pyxis":
        name = "tiny.sqsh"  # to pyxis alone this is an image of a registry
        subprocess.run(["mksquashfs", image, place / name, "-quiet"], check=True, stdout=subprocess.DEVNULL)
        mounts = ",".join(f"{folder}:{folder}" for folder in FOLDERS[1:])
        env["SKYRL_CONTAINER_ARGS"] = f"--container-mounts={mounts} --no-container-mount-home"
    elif program == "enroot":
        env["SKYRL_CONTAINER_RUNTIME"] = "enroot"
    return Box(place / "bin", name, real, env)


def skeleton(image: Path) -> None:
    """A root folder: places to mount on, a variable, an entrypoint that must not run, and a mark."""
    for folder in ("etc", "usr/bin", "tmp", "root", "dev", "proc", "sys", "var/run", "home", ".singularity.d"):
        (image / folder).mkdir(parents=True, exist_ok=True)
    for folder in ("bin", "sbin", "lib", "lib64"):
        (image / folder).symlink_to(f"usr/{folder}")
    shutil.copy("/bin/sh", image / "usr/bin/sh")  # some look for it before they mount
    for name in ("etc/passwd", "etc/group"):
        shutil.copy(f"/{name}", image / name)
    for folder in FOLDERS:
        (image / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
    (image / "etc/environment").write_text(f"IN_IMAGE=tiny\nPATH={PATH}\n")
    (image / "etc/profile").write_text("PATH=/usr/bin:/bin\n")  # as Debian's does
    (image / "etc/fstab").write_text("/usr /usr none rbind,ro\n")
    (image / "etc/rc").write_text("cd /root\nif [ -s /etc/rc.local ]; then . /etc/rc.local; fi\nexec false\n")
    (image / "mark").touch()


def _program(program: str, folder: Path) -> bool:
    """Puts it into a folder; whether it is the real one."""
    folder.mkdir(parents=True)
    if program == "pyxis":
        if "--container-image" not in command("srun", "--help", cwd=folder).stdout:
            pytest.skip("this Slurm has no pyxis")
        return True
    given = os.environ.get("SKYRL_TEST_PROGRAMS", "")
    if given and (Path(given) / program).exists():
        for path in Path(given).glob(f"{program}*"):  # enroot has helpers beside it
            (folder / path.name).symlink_to(path.resolve())
        return True
    if program == "singularity":
        pytest.skip("SKYRL_TEST_PROGRAMS names no folder with singularity; apptainer has the same command line")
    here = Path(__file__).with_name("stand_in.py")
    (folder / program).write_text(f'#!/bin/sh\nexec {sys.executable} -SE {here} {program} "$@"\n')
    (folder / program).chmod(0o755)
    return False
