"""Signing in at a real local provider, and each way in which that must fail: a page with a reason, nobody is in."""

import base64
import hashlib
import socket
import time
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from joserfc.jwk import OctKey, RSAKey
from starlette.testclient import TestClient

pytest.importorskip("oidc_provider_mock")
from provider import running_provider  # noqa: E402
from test_access import HTML, app_of, audit_of, csrf_of  # noqa: E402

from skyrl.config.schema_server import DashboardConfig  # noqa: E402
from skyrl.dashboard.auth import Auth  # noqa: E402

URL = "http://127.0.0.1:6007"
ELSEWHERE = httpx.Client(trust_env=False, verify=False)  # the browser at the provider's page


@pytest.fixture(scope="module")
def provider_and_issuer():
    with running_provider() as running:
        running[0].add_user("alice", email="alice@example.org", groups=["ml", "other"])
        running[0].add_user("root", email="root@example.org", groups=["ml", "ops"])
        running[0].add_user("mallory", email="mallory@example.org", groups=["sales"])
        running[0].add_user("deep", realm_access={"roles": ["ml", 7, None]})
        running[0].add_user("plain", groups="ml")
        yield running


@pytest.fixture(autouse=True)
def provider(provider_and_issuer):
    provider_and_issuer[0].reset()
    return provider_and_issuer[0]


@pytest.fixture
def settings(provider_and_issuer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "secret").write_text("hush-hush\n")
    return {
        "runs": str(tmp_path),
        "public_url": URL,
        "oidc_issuer": provider_and_issuer[1],
        "oidc_client_id": "skyrl",
        "oidc_client_secret_file": str(tmp_path / "secret"),
        "viewer_groups": ["ml"],
        "admin_groups": ["ops"],
    }


@pytest.fixture
def auth(settings):
    return Auth(DashboardConfig(**settings))


def client_of(auth):
    return TestClient(app_of(auth), base_url=URL, follow_redirects=False, headers=HTML)


def answer_of(client, user, **query):
    """The address to which the provider sends the browser back, after `user` has signed in on the provider's page."""
    begun = client.get("/login/oidc", params=query)
    assert begun.status_code == 303, begun.text
    return ELSEWHERE.post(begun.headers["location"], data={"sub": user}).headers["location"]


def sign_in(client, user, **query):
    return client.get(answer_of(client, user, **query))


def is_refused(answer, client, words, status=403):
    assert answer.status_code == status and words in answer.text, (answer.status_code, answer.text)
    assert "Traceback" not in answer.text and 'role="alert"' in answer.text
    assert client.get("/").status_code == 303


def test_sign_in_with_pkce(auth, provider):
    client = client_of(auth)
    assert "/login/oidc?next=%2Fcompare" in client.get("/login?next=/compare").text
    begun = client.get("/login/oidc?next=/compare")
    asked = {name: values[0] for name, values in parse_qs(urlsplit(begun.headers["location"]).query).items()}
    assert asked["response_type"] == "code" and asked["redirect_uri"] == f"{URL}/callback"
    assert asked["code_challenge_method"] == "S256" and len(asked["nonce"]) >= 32 and len(asked["state"]) >= 32
    assert "HttpOnly" in begun.headers["set-cookie"] and "SameSite=lax" in begun.headers["set-cookie"]
    back = ELSEWHERE.post(begun.headers["location"], data={"sub": "alice"}).headers["location"]
    answer = client.get(back)
    assert answer.headers["location"] == "/compare" and client.get("/compare").text == "alice@example.org sees /compare"
    form, authorization = provider.seen[-1]
    digest = hashlib.sha256(form["code_verifier"].encode()).digest()
    assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == asked["code_challenge"]
    assert base64.b64decode(authorization.removeprefix("Basic ")) == b"skyrl:hush-hush"
    written = (auth.state / "audit.jsonl").read_text()
    assert asked["state"] not in written and "code=" not in written and "hush" not in written
    logins = [(line["viewer"], line["subject"]) for line in audit_of(auth) if line.get("event") == "login"]
    assert logins == [("alice@example.org", "alice")]


def test_a_token_logs_nobody_in_where_people_sign_in(auth):
    assert "token" not in auth.announce(URL)
    client = client_of(auth)
    assert (
        client.get("/login?token=").status_code == 200 and client.post("/login", data={"token": ""}).status_code == 200
    )
    assert client.get("/").status_code == 303


def test_roles(auth):
    viewer, admin = client_of(auth), client_of(auth)
    sign_in(viewer, "alice")
    sign_in(admin, "root")
    assert admin.get("/links").status_code == 200
    refused = viewer.get("/links")
    assert refused.status_code == 403 and "admin" in refused.text
    assert viewer.post("/links", data={"csrf": csrf_of(admin), "run": "a", "hours": "1"}).status_code == 403


def test_groups_elsewhere(settings, provider):
    deep = client_of(Auth(DashboardConfig(**settings | {"oidc_groups_claim": "realm_access.roles"})))
    assert sign_in(deep, "deep").status_code == 303 and deep.get("/").status_code == 200
    plain = client_of(Auth(DashboardConfig(**settings)))
    assert sign_in(plain, "plain").status_code == 303

    client = client_of(Auth(DashboardConfig(**settings)))
    provider.change_claims = lambda claims, header: claims.update(groups=None, sub="bob")
    is_refused(sign_in(client, "alice"), client, "in no group")  # userinfo is of another person than the ID token
    provider.change_claims = lambda claims, header: claims.pop("groups")
    is_refused(sign_in(client, "mallory"), client, "in no group")
    assert sign_in(client_of(Auth(DashboardConfig(**settings))), "alice").status_code == 303  # userinfo has them
    provider.change_claims = set_claims(groups=["sales"])  # what the ID token says comes first
    is_refused(sign_in(client, "alice"), client, "in no group")
    provider.change_claims = set_claims(groups=["ml"])
    assert sign_in(client, "mallory").status_code == 303 and client.get("/").status_code == 200


def test_not_in_a_group(auth):
    client = client_of(auth)
    is_refused(sign_in(client, "mallory"), client, "mallory@example.org, who is in no group")
    is_refused(sign_in(client, "nobody-known"), client, "in no group")
    assert {line["event"] for line in audit_of(auth) if "event" in line} == {"login refused"}


def set_claims(**given):
    return lambda claims, header: claims.update({k: v() if callable(v) else v for k, v in given.items()})


FORGED = {
    "expired": set_claims(exp=lambda: int(time.time()) - 100),
    "not yet": set_claims(iat=lambda: int(time.time()) + 1000),
    "audience": set_claims(aud="another"),
    "audiences": set_claims(aud=["skyrl", "another"]),
    "party": set_claims(aud=["skyrl", "another"], azp="another"),
    "issuer": set_claims(iss="https://id.example.org"),
    "nonce": set_claims(nonce="of an earlier sign-in"),
    "no nonce": lambda claims, header: claims.pop("nonce"),
    "no end": lambda claims, header: claims.pop("exp"),
    "no subject": lambda claims, header: claims.pop("sub"),
    "subject": set_claims(sub=["alice"]),
    "access token": set_claims(at_hash="x"),
    "times": set_claims(exp="tomorrow"),
    "critical": lambda claims, header: header.update(crit=["new"], new="1"),
}


@pytest.mark.parametrize("what", FORGED)
def test_tokens_that_are_not_for_us(auth, provider, what):
    provider.change_claims = FORGED[what]
    client = client_of(auth)
    is_refused(sign_in(client, "alice"), client, "not valid")


def test_tokens_that_the_provider_did_not_sign(auth, provider):
    client = client_of(auth)
    provider.change_claims, provider.key = set_claims(), RSAKey.generate_key(2048)
    is_refused(sign_in(client, "alice"), client, "not valid")
    public = ELSEWHERE.get(auth._settings.oidc_issuer + "/jwks").text
    provider.algorithm, provider.key = "HS256", OctKey.import_key(public)
    is_refused(sign_in(client, "alice"), client, "not valid")
    none = [base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (b'{"alg":"none"}', b'{"sub":"alice"}')]
    for token in (".".join(none) + ".", "x", "a.b.c", 7, {}):
        provider.token = token or {"a": 1}
        is_refused(sign_in(client, "alice"), client, "not valid")


def test_an_answer_counts_once_and_in_its_browser(auth):
    client, thief = client_of(auth), client_of(auth)
    back = answer_of(client, "alice")
    is_refused(thief.get(back), thief, "not begun in this browser", 400)
    thief.get("/login/oidc")
    is_refused(thief.get(back), thief, "another sign-in", 400)
    cookies = dict(client.cookies)
    assert client.get(back).status_code == 303
    replayed = client_of(auth)
    replayed.cookies.update({auth._sign_in_cookie: cookies[auth._sign_in_cookie]})
    is_refused(replayed.get(back), replayed, "was used", 400)
    tampered = client_of(auth)
    answer_of(tampered, "alice")
    value = tampered.cookies[auth._sign_in_cookie]
    tampered.cookies.clear()
    tampered.cookies.set(auth._sign_in_cookie, value[:-3] + ("AAA" if value[-3] != "A" else "BBB"))
    is_refused(tampered.get(back), tampered, "not begun", 400)


def test_answers_that_are_none(auth, monkeypatch):
    client = client_of(auth)
    for change, words, status in (
        ({"code": "made-up"}, "not valid", 403),
        ({"code": ""}, "did not let you in", 403),
        ({"error": "access_denied<script>"}, "did not let you in", 403),
        ({"state": "x"}, "another sign-in", 400),
        ({"state": "é"}, "another sign-in", 400),
        ({"iss": "https://evil.org"}, "another sign-in service", 400),
    ):
        back = urlsplit(answer_of(client, "alice"))
        query = {name: values[0] for name, values in parse_qs(back.query).items()} | change
        answer = client.get(back.path, params=query)
        is_refused(answer, client, words, status)
        assert "<script" not in answer.text
    is_refused(client.get("/callback"), client, "not begun", 400)
    back = answer_of(client, "alice")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 599)
    monkeypatch.setattr("skyrl.dashboard.oidc.time.time", lambda: now + 601)
    assert client.get(back).status_code == 400


def test_logged_out_stays_out(auth):
    client = client_of(auth)
    sign_in(client, "root")
    cookie = client.cookies[auth._cookie]
    assert client.post("/logout", data={"csrf": csrf_of(client)}).headers["location"] == "/login"
    assert client.get("/", headers={"cookie": f"{auth._cookie}={cookie}"}).status_code == 303


def test_provider_that_is_down_or_wrong(settings, provider, caplog):
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        nobody = client_of(
            Auth(DashboardConfig(**settings | {"oidc_issuer": f"http://127.0.0.1:{taken.getsockname()[1]}"}))
        )
        answer = nobody.get("/login/oidc")
        is_refused(answer, nobody, "does not answer", 503)
    client = client_of(Auth(DashboardConfig(**settings)))
    back = answer_of(client, "alice")
    provider.down = True
    is_refused(client.get(back), client, "does not answer", 503)
    is_refused(client.get("/login/oidc"), client, "does not answer", 503)
    provider.down = False
    for change in ({"issuer": "https://evil.org"}, {"token_endpoint": "http://evil.org"}, {"jwks_uri": None}):
        provider.change_metadata = lambda metadata, change=change: metadata.update(change)
        caplog.clear()
        is_refused(client.get("/login/oidc"), client, "its log says why", 503)
        assert "dashboard.oidc_issuer" in caplog.text
    provider.change_metadata = lambda metadata: metadata.update(userinfo_endpoint=None, scopes_supported=["groups"])
    assert "groups" in parse_qs(urlsplit(client.get("/login/oidc").headers["location"]).query)["scope"][0]
    slash = client_of(Auth(DashboardConfig(**settings | {"oidc_issuer": settings["oidc_issuer"] + "/"})))
    is_refused(slash.get("/login/oidc"), slash, "its log says why", 503)


def test_public_client_has_no_secret(settings, provider, monkeypatch):
    from oidc_provider_mock import _app

    monkeypatch.setattr(_app.AuthorizationCodeGrant, "TOKEN_ENDPOINT_AUTH_METHODS", ["none"])
    client = client_of(Auth(DashboardConfig(**settings | {"oidc_client_secret_file": ""})))
    assert sign_in(client, "alice").status_code == 303
    form, authorization = provider.seen[-1]
    assert authorization == "" and "client_secret" not in form and form["client_id"] == "skyrl"


def test_secret_in_the_form_where_the_provider_wants_it_there(settings, provider):
    provider.change_metadata = lambda told: told.update(token_endpoint_auth_methods_supported=["client_secret_post"])
    client = client_of(Auth(DashboardConfig(**settings)))
    assert sign_in(client, "alice").status_code == 303
    form, authorization = provider.seen[-1]
    assert authorization == "" and form["client_secret"] == "hush-hush"
