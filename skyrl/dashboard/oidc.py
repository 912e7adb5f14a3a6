"""Signing in at an OpenID Connect provider: authorization code with PKCE (RFC 7636), by Authlib.

Sources: OpenID Connect Core 1.0, sections 3.1.2, 3.1.3 and 5.3; Discovery 1.0, section 4; RFC 9207 (`iss`). What
the provider says of itself is read anew at each sign-in, so a change of its keys needs nothing here.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyrl.config.access import is_secure_url
from skyrl.config.schema_server import DashboardConfig
from skyrl.types import UserError

log = logging.getLogger("skyrl.dashboard")

# No "none", and no HMAC, whose secret a client could take from the provider's public key.
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519"]
SIGN_IN_SECONDS = 600
PROVIDER_SECONDS = 10.0
CLOCK_SECONDS = 60  # by which this machine's clock and the provider's may differ
ASK_AGAIN = "Please begin again."


class SignInRefused(Exception):
    """A sign-in that ends in a page: its HTTP status, and the reason for whoever signs in."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class SignIn:
    """A sign-in that has begun: what its answer must fit, and the page that follows it."""

    target: str
    state: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    nonce: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    verifier: str = field(default_factory=lambda: secrets.token_urlsafe(48))
    expires: float = field(default_factory=lambda: time.time() + SIGN_IN_SECONDS)


class OidcProvider:
    """The provider `dashboard.oidc_issuer`. `begin` and `finish` wait for the network: call them in a thread."""

    def __init__(self, settings: DashboardConfig) -> None:
        """Raises UserError for a client secret that cannot be read."""
        import httpx2

        self._settings, self._secret = settings, _read_secret(settings.oidc_client_secret_file)
        self._trusted = httpx2.create_ssl_context()  # once: it reads all certificates

    def begin(self, target: str) -> tuple[str, SignIn]:
        """(address at the provider where a person signs in, what the answer must fit). Raises SignInRefused."""
        begun = SignIn(target)
        with self._client() as client:
            metadata = self._metadata(client)
            if "groups" in metadata.get("scopes_supported", ()):
                client.scope += " groups"
            url, _ = client.create_authorization_url(
                metadata["authorization_endpoint"], begun.state, code_verifier=begun.verifier, nonce=begun.nonce
            )
        return url, begun

    def finish(self, answer: Mapping[str, str], begun: SignIn) -> tuple[str, str, str]:
        """(name, role, subject) of the person of the provider's answer, its query. Names may be chosen freely at some
        providers, the subject not. The caller forgets `begun` first: an answer counts once. Raises SignInRefused."""
        if begun.expires < time.time():
            raise SignInRefused(400, f"This sign-in took too long. {ASK_AGAIN}")
        if not hmac.compare_digest(answer.get("state", "").encode(), begun.state.encode()):
            raise SignInRefused(400, f"This answer belongs to another sign-in. {ASK_AGAIN}")
        if answer.get("iss", self._settings.oidc_issuer) != self._settings.oidc_issuer:
            raise SignInRefused(400, f"This answer is from another sign-in service. {ASK_AGAIN}")
        if "error" in answer or not answer.get("code"):
            log.warning("sign-in: the provider answered error=%.100r", answer.get("error"))
            raise SignInRefused(403, f"The sign-in service did not let you in. {ASK_AGAIN}")
        with self._client() as client:
            metadata = self._metadata(client)
            claims = self._claims(client, metadata, answer["code"], begun)
            groups = _groups(claims, self._settings.oidc_groups_claim)
            if groups is None and is_secure_url(metadata.get("userinfo_endpoint")):  # many providers put them there
                told = self._get(client, metadata["userinfo_endpoint"], withhold_token=False)
                if told.get("sub") == claims["sub"]:  # another's must not be used
                    groups = _groups(told, self._settings.oidc_groups_claim)
        name = next(str(claims[key]) for key in ("email", "preferred_username", "name", "sub") if claims.get(key))[:200]
        return name, self._role(name, groups or []), str(claims["sub"])

    def _role(self, name: str, groups: list[str]) -> str:
        for role, allowed in (("admin", self._settings.admin_groups), ("viewer", self._settings.viewer_groups)):
            if set(allowed) & set(groups):
                return role
        log.warning("sign-in: %r is in no group that may see the dashboard, but in %.300r", name, groups)
        raise SignInRefused(403, f"You are {name}, who is in no group that may see this dashboard. Its admin can help.")

    def _client(self) -> Any:
        from authlib.integrations.httpx_client import OAuth2Client

        return OAuth2Client(
            self._settings.oidc_client_id,
            self._secret,
            token_endpoint_auth_method="client_secret_basic" if self._secret else "none",
            scope="openid profile email",
            redirect_uri=self._settings.public_url.rstrip("/") + "/callback",
            code_challenge_method="S256",
            timeout=PROVIDER_SECONDS,
            verify=self._trusted,
        )

    def _metadata(self, client: Any) -> dict[str, Any]:
        issuer = self._settings.oidc_issuer
        found = self._get(client, issuer.rstrip("/") + "/.well-known/openid-configuration")
        wrong = "" if found.get("issuer") == issuer else f"calls itself {found.get('issuer')!r}: give that name"
        for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
            wrong = wrong or ("" if is_secure_url(found.get(name)) else f"has no {name} with https")
        if wrong:
            log.error("sign-in: dashboard.oidc_issuer=%s %s", issuer, wrong)
            raise SignInRefused(503, "This dashboard and the sign-in service do not fit together; its log says why.")
        methods = found.get("token_endpoint_auth_methods_supported") or ["client_secret_basic"]
        if self._secret and "client_secret_basic" not in methods:
            client.token_endpoint_auth_method = "client_secret_post"
        return found

    def _claims(self, client: Any, metadata: dict[str, Any], code: str, begun: SignIn) -> dict[str, Any]:
        """Of the ID token, checked as section 3.1.3.7 asks."""
        from authlib.oidc.core import CodeIDToken
        from joserfc import jwt
        from joserfc.jwk import KeySet

        wanted = {"iss": self._settings.oidc_issuer, "aud": self._settings.oidc_client_id, "nonce": begun.nonce}
        keys: Any = self._get(client, metadata["jwks_uri"])
        try:
            token = client.fetch_token(metadata["token_endpoint"], code=code, code_verifier=begun.verifier)
            signed = jwt.decode(token["id_token"], KeySet.import_key_set(keys), algorithms=ALGORITHMS)
            claims = CodeIDToken(
                signed.claims,
                signed.header,
                options={name: {"essential": True, "value": value} for name, value in wanted.items()},
                params={"client_id": wanted["aud"], "nonce": begun.nonce, "access_token": token.get("access_token")},
            )
            claims.validate(leeway=CLOCK_SECONDS)
        except Exception as error:  # Authlib's, joserfc's, httpx's and those of what is no token have no other base
            log.warning("sign-in: refused what %s gave: %s", metadata["token_endpoint"], _said(error))
            raise SignInRefused(
                403, f"What the sign-in service sent is not valid, so it is refused. {ASK_AGAIN}"
            ) from None
        return claims

    def _get(self, client: Any, url: str, *, withhold_token: bool = True) -> dict[str, Any]:
        try:
            answer = client.request("GET", url, withhold_token=withhold_token)
            answer.raise_for_status()
            return dict(answer.json())
        except Exception as error:  # httpx's, Authlib's and JSON's
            log.error("sign-in: %s: %s", url, _said(error))
            raise SignInRefused(503, "The sign-in service does not answer. Please try again in some minutes.") from None


def _groups(claims: Mapping[str, Any], name: str) -> list[str] | None:
    """The groups in a claim, whose name is taken whole or as a path (realm_access.roles); None where it is absent."""
    found: Any = claims.get(name)
    if found is None:
        found = claims
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
    found = [found] if isinstance(found, str) else found
    return None if not isinstance(found, list) else [group for group in found if isinstance(group, str)]


def _read_secret(file: str) -> str | None:
    try:
        secret, why = Path(file).read_text(encoding="utf-8").strip() if file else None, "is empty"
    except (OSError, ValueError) as error:
        secret, why = "", getattr(error, "strerror", None) or "is no text"
    if secret == "":
        raise UserError(
            f"dashboard.oidc_client_secret_file={file}: {why}; give a file that holds the client secret alone"
        )
    return secret


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
