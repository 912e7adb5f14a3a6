"""checkpoint.push_to_hub over ranks: rank 0 talks to the hub (hub/push.py), the others wait for what comes of it."""

from __future__ import annotations

from pathlib import Path

from skyrl.config.schema import CheckpointConfig
from skyrl.distributed.collectives import on_leader
from skyrl.distributed.init import World
from skyrl.distributed.phases import heartbeat
from skyrl.hub.push import HubUpload, make_repository


def prepare_export(world: World, options: CheckpointConfig) -> list[str]:
    """Before the first step: the repository is there and may be written, or it is a warning, which is returned, that
    the hub did not answer. Collective. Raises UserError on every rank when the hub refuses."""
    if not options.push_to_hub:
        return []
    warning = on_leader(world, lambda: make_repository(options.push_to_hub, options.hub_private))
    return [warning] if warning else []


def send_export(world: World, options: CheckpointConfig, folder: Path, of: str) -> str | None:
    """Sends the exported `folder`, of a run and step that `of` names; the address, or what failed, the same on every
    rank; None where that is not asked. Collective: ranks ask together how it goes, so that none waits for longer than
    its patience, however long it takes."""
    if not options.push_to_hub:
        return None
    upload = HubUpload(folder, options.push_to_hub, f"skyrl: {of}") if world.is_leader else None
    while (told := on_leader(world, lambda: upload.wait() if upload is not None else None)) is None:
        heartbeat()
    return told
