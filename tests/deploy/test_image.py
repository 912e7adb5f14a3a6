"""The image's target `cpu`, built and run where a builder can work (`make test-image`): by buildah, without a daemon.

SKYRL_TEST_IMAGE_ARGS: more words for the build, such as "--build-arg=BASE=registry.local/python:3.12-slim".
"""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME, VERSION, REVISION = "localhost/skyrl-test:cpu", "9.8.7", "0123abc"
# Without namespaces of its own and overlays, which a container that tests run in seldom allows.
ENV = {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs", **os.environ}
SHORT = "run.name=first batch.num_steps=2 warmup.num_steps=2 eval.num_prompts=4 model.tiny.num_layers=2"

pytestmark = [
    pytest.mark.skipif(os.environ.get("SKYRL_TEST_IMAGE") != "1", reason="builds an image of 2 GB: make test-image"),
    pytest.mark.skipif(shutil.which("buildah") is None, reason="needs buildah"),
]


def run(*words: object, refused: bool = False) -> str:
    done = subprocess.run([str(word) for word in words], env=ENV, capture_output=True, text=True)
    assert (done.returncode != 0) == refused, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def image():
    more = shlex.split(os.environ.get("SKYRL_TEST_IMAGE_ARGS", ""))
    given = [f"--build-arg=VERSION={VERSION}", f"--build-arg=REVISION={REVISION}", "--format=docker"]
    run("buildah", "bud", "--target=cpu", *given, *more, "-t", NAME, ROOT)
    yield NAME
    run("buildah", "rmi", "--force", NAME)


@pytest.fixture(scope="module")
def inside(image):
    """Runs words in a container of the image as its own user, with a loopback alone."""
    container = run("buildah", "from", "--pull-never", image).strip().splitlines()[-1]
    alone = 'ip link set lo up && exec buildah run "$@"'

    def inside(*words: str, refused: bool = False) -> str:
        return run("unshare", "--net", "sh", "-c", alone, "sh", container, "--", *words, refused=refused)

    yield inside
    run("buildah", "rm", container)


def test_labels_user_and_health_check(image):
    found = json.loads(run("buildah", "inspect", "--type=image", image))["Docker"]["config"]
    labels = {name.rpartition(".")[2]: text for name, text in found["Labels"].items()}
    assert (labels["version"], labels["revision"], labels["licenses"]) == (VERSION, REVISION, "Apache-2.0")
    assert found["User"] == "1000:1000" and found["Entrypoint"][0] == "tini" and found["Healthcheck"]["Test"]


def test_it_trains_without_a_network(inside):
    assert inside("skyrl-tx", "--version").strip().endswith(f"skyrl {VERSION}")
    assert inside("id", "-u").strip() == "1000"
    inside("python", "-c", "import socket; socket.create_connection(('192.0.2.1', 53), 5)", refused=True)
    # The name of this machine means no address in there, and ranks would look for it for minutes.
    torchrun = ["env", "OMP_NUM_THREADS=1", "torchrun", "--local-addr=127.0.0.1", "--nproc_per_node=2"]
    said = inside(*torchrun, "-m", "skyrl.train", *SHORT.split())
    assert "done: held-out accuracy" in said
    assert "model.safetensors" in inside("ls", "runs/first/export")
