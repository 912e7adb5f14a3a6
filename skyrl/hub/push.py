"""The export of a run on the Hugging Face Hub: what can be refused is refused at the start, files go at the end.

Which hub, and who we are, is told to huggingface_hub as anywhere: HF_ENDPOINT, HF_TOKEN or `hf auth login`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skyrl.hub.locate import limit_silence, may_pass
from skyrl.types import UserError


@contextmanager
def _one_line(doing: str) -> Iterator[None]:
    """Whatever the hub or the way to it raises, as a UserError of one line."""
    try:
        limit_silence()
        yield
    except Exception as error:  # of one of three HTTP libraries, as the release of huggingface_hub has it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        what = lines[0].partition(" for url")[0].rstrip(":")  # the last line is what the hub itself says
        raise UserError(f"{doing}: {what}" + (f": {lines[-1]}" if len(lines) > 1 else "")) from error


def make_repository(name: str, private: bool) -> str:
    """Makes the model repository `name` on the hub where there is none yet, so that a token or a name that cannot work
    is known before the first step and not after the last one. Returns a warning where the hub does not answer, which
    may be another at the end; else "".

    Raises UserError without a token, in offline mode, and when the hub refuses.
    """
    from huggingface_hub import HfApi, constants, get_token

    option = f"checkpoint.push_to_hub={name}"
    if constants.is_offline_mode():
        raise UserError(f"{option}: HF_HUB_OFFLINE forbids the network; unset it, or leave checkpoint.push_to_hub out")
    if not get_token():
        raise UserError(f"{option}: no token; set HF_TOKEN to one that may write, or log in by `hf auth login`")
    api = HfApi()
    try:
        with _one_line(option):
            api.create_repo(name, private=private, exist_ok=True)
    except UserError as error:
        if not may_pass(error):
            raise UserError(f"{error} ({api.endpoint} refuses; is the token one that may write there?)") from error
        return f"{error} ({api.endpoint} gives no answer of use; the export is sent at the end of the run all the same)"
    return ""


class HubUpload:
    """Sends a folder in a thread of its own, since that may take an hour, in which other ranks ask whether it is done.

    Files that the repository has already are not sent again, so that a second try costs what the first one lacked.
    """

    def __init__(self, folder: Path, name: str, message: str) -> None:
        self._told, sent = "", (folder, name, message)
        self._thread = threading.Thread(target=self._send, args=sent, name="skyrl-hub", daemon=True)
        self._thread.start()

    def _send(self, folder: Path, name: str, message: str) -> None:
        from huggingface_hub import HfApi, utils

        utils.disable_progress_bars()
        try:
            with _one_line(f"checkpoint.push_to_hub={name}"):
                done = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=message)
            self._told = str(done.commit_url)
        except UserError as error:  # an upload that fails costs the upload alone
            self._told = f"not sent: {error}; the same command tries again, or: hf upload {name} {folder}"

    def wait(self, seconds: float = 10.0) -> str | None:
        """The address of the commit, or a line about what failed; None while it is not done after `seconds`."""
        self._thread.join(seconds)
        return None if self._thread.is_alive() else self._told
