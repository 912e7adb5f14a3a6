"""Who may come in: keys from a file or the environment, and addresses that are signed instead of carrying a key.

A key belongs to a name, and the name owns what is made with it. Without keys everyone is the owner "local".
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request

from skyrl.config.access import is_loopback
from skyrl.config.schema import ServiceConfig
from skyrl.types import UserError
from skyrl.web.http import HttpError

ENVIRONMENT = "SKYRL_API_KEYS"
LOCAL_OWNER = "local"
SIGNED_SECONDS = 3600


class Keys:
    """Owner of a key. Holds digests alone, and compares a given key with every one of them in constant time."""

    def __init__(self, owner_of_key: dict[str, str]) -> None:
        self._owners = [(_digest(key), owner) for key, owner in owner_of_key.items()]

    @property
    def required(self) -> bool:
        """Whether there are keys at all."""
        return bool(self._owners)

    @property
    def shared(self) -> bool:
        """Whether there are keys of several owners."""
        return len({owner for _, owner in self._owners}) > 1

    def number(self, owner: str) -> int:
        """A number for the owner's (first) key, from 1; 0 when there are no keys."""
        return next((i for i, (_, name) in enumerate(self._owners, 1) if name == owner), 0)

    def owner(self, key: str | None) -> str | None:
        """The owner whose key this is, None for a wrong or missing one; "local" for any when there are no keys."""
        if not self._owners:
            return LOCAL_OWNER
        given, found = _digest(key or ""), None
        for known, owner in self._owners:
            if hmac.compare_digest(known, given):
                found = owner
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(service: ServiceConfig) -> Keys:
    """The keys of service.keys_file, else of SKYRL_API_KEYS.

    Raises: UserError for a line that is no `name:key`, and for an address that others reach while nobody needs a key.
    """
    if service.keys_file:
        path = Path(service.keys_file)
        where = f"service.keys_file={service.keys_file}"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}; give a file with one name:key a line") from error
    else:
        where, lines = ENVIRONMENT, os.environ.get(ENVIRONMENT, "").split(",")
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        owner, colon, key = (part.strip() for part in text.partition(":"))
        # The key itself is never told: errors end in logs.
        if not colon or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", owner):
            raise UserError(f"{where}, entry {number}: write name:key, the name of letters, digits, _ . or -")
        if not re.fullmatch(r"tml-[!-~]+", key):
            raise UserError(
                f"{where}, entry {number}: the key of {owner} must begin with tml- and have no spaces, since clients "
                "refuse others"
            )
        if found.get(key, owner) != owner:
            raise UserError(f"{where}, entry {number}: {owner} has the same key as {found[key]}; give each their own")
        found[key] = owner
    if service.keys_file and not found:
        raise UserError(f"{where}: has no key; write one name:key a line")
    if not found and not service.allow_anonymous and not is_loopback(service.host):
        raise UserError(
            f"service.host={service.host}: others could use this server without a key; give service.keys_file or "
            f"{ENVIRONMENT}, listen on 127.0.0.1, or set service.allow_anonymous=true"
        )
    return Keys(found)


class Signer:
    """Signs addresses for plain GETs without a key, and tokens that stand for a key for a while. A `secret` that is
    not given lives as long as the process, and no signature outlives it."""

    def __init__(self, secret: bytes | None = None) -> None:
        self._secret = secret or secrets.token_bytes(32)

    def sign(self, path: str, *, seconds: int = SIGNED_SECONDS) -> tuple[str, float]:
        """(percent-encoded `path` with its signature as a query, Unix time at which it ends)."""
        expires = int(time.time()) + seconds
        return f"{quote(path)}?expires={expires}&signature={self._signature(path, expires)}", float(expires)

    def valid(self, path: str, expires: str, signature: str) -> bool:
        """Whether `path` (decoded) was signed here, for an end that is not over."""
        if not re.fullmatch(r"[0-9]{1,12}", expires) or int(expires) < time.time():
            return False
        return hmac.compare_digest(self._signature(path, int(expires)).encode(), signature.encode("utf-8", "replace"))

    def address(self, request: Request, path: str) -> tuple[str, float]:
        """A `path` of the server that `request` has reached, as a whole address that is signed, and when that ends."""
        signed, expires = self.sign(path)
        return f"{request.base_url.scheme}://{request.base_url.netloc}{signed}", expires

    def check(self, request: Request) -> None:
        """Raises HttpError 403 unless the request's address was signed here."""
        query = request.query_params
        if not self.valid(request.scope["path"], query.get("expires", ""), query.get("signature", "")):
            raise HttpError(403, "this address is not signed by this server, or has expired; ask for a new one")

    def token(self, owner: str, *, seconds: int = SIGNED_SECONDS) -> str:
        """A JWT (HS256) that stands for the owner's key. Clients read sub and org_id, and exp to renew it in time."""
        now = int(time.time())
        claims = {"sub": owner, "org_id": LOCAL_OWNER, "iat": now, "exp": now + seconds}
        parts = [_base64(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
        return ".".join([*parts, self._seal(".".join(parts))])

    def token_owner(self, token: str) -> str | None:
        """The owner of a JWT that was made here and has not expired, else None."""
        signed, _, seal = token.rpartition(".")
        if not hmac.compare_digest(self._seal(signed).encode(), seal.encode("utf-8", "replace")):
            return None
        body = signed.partition(".")[2]
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        return claims["sub"] if claims["exp"] > time.time() else None

    def _seal(self, text: str) -> str:
        return _base64(hmac.new(self._secret, b"jwt\n" + text.encode("utf-8", "replace"), hashlib.sha256).digest())

    def _signature(self, path: str, expires: int) -> str:
        return hmac.new(self._secret, f"url\n{expires}\n{path}".encode(), hashlib.sha256).hexdigest()


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def find_owner(keys: Keys, signer: Signer, request: Request) -> str:
    """Whose key the request carries, in X-API-Key or as a bearer. Raises HttpError 401, 403."""
    if not keys.required:
        _refuse_browsers(request)
        return LOCAL_OWNER
    given = request.headers.get("x-api-key")
    if given is None:
        scheme, _, rest = request.headers.get("authorization", "").partition(" ")
        given = rest.strip() if scheme.lower() == "bearer" else None
    if given is not None and given.startswith("eyJ"):
        owner = signer.token_owner(given)
        if owner is None:
            told = {"www-authenticate": 'Bearer error="invalid_token"'}
            raise HttpError(401, "this token is not ours or has expired; ask auth/token for another", told)
        return owner
    owner = keys.owner(given)
    if owner is None:
        raise HttpError(401, "no valid API key; set TINKER_API_KEY to one that this server knows")
    return owner


def _refuse_browsers(request: Request) -> None:
    """Without keys a web page that the user has open could post here; browsers say where a page is from."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host", ""):
        raise HttpError(403, f"requests of web pages ({origin[:200]}) need a key; start the server with keys")
