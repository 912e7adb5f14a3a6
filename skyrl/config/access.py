"""Which addresses only this machine reaches, and what must be right before the dashboard is shown to others."""

from __future__ import annotations

import importlib.util
import ipaddress
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from skyrl.config.schema_server import DashboardConfig


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name counts only if it is localhost."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_secure_url(url: Any) -> bool:
    """Whether nobody on the way can read what is sent there: https, or http that stays on this machine."""
    try:
        parts = urlsplit(str(url))
        host = parts.hostname or ""
    except ValueError:
        return False
    return bool(host) and (parts.scheme == "https" or parts.scheme == "http" and is_loopback(host))


def dashboard_problems(page: DashboardConfig) -> Iterator[str]:
    """One line for each option of the dashboard that cannot be kept, and for a package that it needs and lacks."""
    needed = ("starlette", "uvicorn", "jinja2", *(("authlib", "httpx2", "joserfc") if page.oidc_issuer else ()))
    for package in needed if page.enabled else ():
        if importlib.util.find_spec(package) is None:
            yield f"dashboard: the package {package} is missing; pip install 'skyrl-spmd[dashboard]'"
    if page.port > 65535:
        yield f"dashboard.port={page.port}: must be at most 65535; 0 = any free one"
    if not page.host:
        yield "dashboard.host: is empty; give an address to listen on, for example 127.0.0.1"
    if page.path_prefix and not re.fullmatch(r"(/[A-Za-z0-9_.~-]+)+", page.path_prefix):
        yield (
            f"dashboard.path_prefix={page.path_prefix}: must begin with / and not end with it, and have letters, "
            "digits, _ . ~ - alone, for example /skyrl"
        )
    yield from _access_problems(page)


def _access_problems(page: DashboardConfig) -> Iterator[str]:
    for name in ("oidc_issuer", "public_url"):
        url = getattr(page, name)
        if url and (not is_secure_url(url) or re.search(r"[?#@\s]", url)):
            yield f"dashboard.{name}={url}: give an address with https:// (http:// on this machine), without ? # @"
            return
    public = urlsplit(page.public_url)
    if page.public_url and public.path.rstrip("/") != page.path_prefix:
        yield (
            f"dashboard.public_url={page.public_url}: must end in dashboard.path_prefix={page.path_prefix!r}, since "
            "the proxy passes the whole path on"
        )
    if not 0 < page.session_hours <= 720:
        yield f"dashboard.session_hours={page.session_hours}: must be above 0 and at most 720"
    if page.oidc_issuer:
        for name in ("oidc_client_id", "public_url", "oidc_groups_claim"):
            if not getattr(page, name):
                yield f"dashboard.{name}: empty; signing in at dashboard.oidc_issuer needs it"
        if not page.viewer_groups and not page.admin_groups:
            yield "dashboard.viewer_groups and admin_groups: empty, so nobody could come in; name the groups that may"
        return
    for name in ("oidc_client_id", "oidc_client_secret_file", "viewer_groups", "admin_groups"):
        if getattr(page, name):
            yield f"dashboard.{name}: has an effect only with dashboard.oidc_issuer; leave it out or give both"
    reached = f"host={page.host}" if not is_loopback(page.host) else f"public_url={page.public_url}"
    if not (page.allow_remote_token or is_loopback(page.host) and is_loopback(public.hostname or "localhost")):
        yield (
            f"dashboard.{reached}: a token alone would guard the dashboard from all who reach it; let people sign in "
            "(dashboard.oidc_issuer), listen on 127.0.0.1 (ssh -L 6007:127.0.0.1:6007 brings it to you), or set "
            "dashboard.allow_remote_token=true"
        )
