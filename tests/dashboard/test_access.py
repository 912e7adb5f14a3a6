"""The dashboard behind its login: tokens, sessions, forms, names, links to single runs, headers, and the audit log."""

import json
import re
import stat
import threading
import time
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from skyrl.config.schema_server import DashboardConfig
from skyrl.dashboard import auth as auth_module
from skyrl.dashboard import board
from skyrl.dashboard.app import create_app
from skyrl.dashboard.auth import Auth
from skyrl.dashboard.index import RunIndex
from skyrl.types import UserError

HTML = {"accept": "text/html"}
URL = "http://127.0.0.1:6007"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("first", "first-longer", "second run"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.jsonl").write_text("")
    return str(tmp_path / "runs")


def app_of(auth, prefix=""):
    """Pages as the dashboard's, which say who looks at what."""

    async def page(request):
        return PlainTextResponse(f"{request.state.viewer.name} sees {request.url.path}")

    async def fails(request):
        raise RuntimeError("a fault with\nlines and a secret")

    async def changes(request):
        return PlainTextResponse(f"{request.state.form}")

    inner = [Route("/", page), Route("/compare", page), Route("/runs/{run}", page), Route("/runs/{run}/series", page)]
    inner += [Route("/fails", fails), Route("/changes", changes, methods=["POST"]), *auth.routes]
    app = Starlette(routes=[Mount(prefix, routes=inner)] if prefix else inner)
    app.add_middleware(auth.middleware)
    return app


def client_of(app, **given):
    return TestClient(app, base_url=URL, follow_redirects=False, headers=HTML, **given)


def token_of(auth):
    return re.search(r"token=(\S+)", auth.announce(URL))[1]


@pytest.fixture
def auth(runs):
    return Auth(DashboardConfig(runs=runs))


@pytest.fixture
def logged_in(auth):
    client = client_of(app_of(auth))
    assert client.get(f"/login?token={token_of(auth)}").headers["location"] == "/"
    return client


def csrf_of(client):
    return re.search(r'name="csrf" value="([^"]+)"', client.get("/links").text)[1]


def audit_of(auth):
    return [json.loads(line) for line in (auth.state / "audit.jsonl").read_text().splitlines()]


def test_nothing_without_login(auth):
    client = client_of(app_of(auth))
    for path in ("/", "/runs/first", "/runs/first/series", "/links", "/nothing", "/login/", "/static", "/staticky/a"):
        answer = client.get(path)
        assert answer.status_code == 303 and answer.headers["location"].startswith("/login?next=%2F"), path
        assert client.get(path, headers={"accept": "text/event-stream"}).status_code == 401
        assert client.post(path).status_code == 401
    assert client.get("/static/../runs/first").status_code == 303  # the client itself makes /runs/first of it
    assert client.get("/static/%2e%2e/runs/first").status_code == 404
    for cookie in ("x", "a.b.c", "é", auth._signer.token("session:made-up"), auth._signer.token("link:x")):
        header = f"{auth._cookie}={cookie}".encode()
        assert client.get("/", headers={"cookie": header}).status_code == 303


def test_token_logs_in_once_and_is_in_no_log(auth, logged_in, capsys):
    assert logged_in.get("/").text == "local sees /"
    token = token_of(auth)
    first, second = client_of(app_of(auth)), client_of(app_of(auth))
    assert first.post("/login?next=/compare", data={"token": f" {token} "}).headers["location"] == "/compare"
    again = second.get(f"/login?token={token}")
    assert again.status_code == 403 and "was used" in again.text and token not in again.text
    assert second.get("/").status_code == 303
    for wrong in ("", "x", token[:-1], "é", token_of(auth) + "x"):
        assert second.post("/login", data={"token": wrong}).status_code == 403
    written = (auth.state / "audit.jsonl").read_text()
    assert token not in written and '"event": "login refused"' in written
    assert stat.S_IMODE((auth.state / "audit.jsonl").stat().st_mode) == 0o600
    assert (
        stat.S_IMODE(auth.state.stat().st_mode) == 0o700 and stat.S_IMODE((auth.state / "key").stat().st_mode) == 0o600
    )


def test_another_link_is_printed_where_the_dashboard_runs(auth, capsys):
    client = client_of(app_of(auth))
    unspent = token_of(auth)
    assert "was printed" in client.post("/login", data={"print": "1"}).text
    assert f"token={unspent}" in capsys.readouterr().out  # one that nobody has used stays: strangers may ask as well
    assert client.post("/login", data={"print": "1"}).status_code == 429
    assert client.post("/login", data={"print": "1"}, headers={"origin": "http://evil.org"}).status_code == 403


def test_link_goes_to_a_private_file_where_others_read_the_log(auth):
    line = auth.announce(URL, into_log=True)
    path = Path(re.search(r"is in (\S+),", line)[1])
    assert "token" not in line and stat.S_IMODE(path.stat().st_mode) == 0o600
    client = client_of(app_of(auth))
    assert client.get(path.read_text().strip()).status_code == 303 and client.get("/").status_code == 200


def test_session_cookie(auth, logged_in):
    cookie = client_of(app_of(auth)).post("/login", data={"token": token_of(auth)}).headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie and "Path=/" in cookie and "Secure" not in cookie
    value = logged_in.cookies[auth._cookie]
    head, body, seal = value.split(".")
    for tampered in (f"{head}.{body}.{seal[:-2]}AA", f"{head}.{body[:-4]}.{seal}", f"{head}.{body}."):
        thief = client_of(app_of(auth), cookies={auth._cookie: tampered})
        assert thief.get("/").status_code == 303


def test_logout_ends_a_copied_cookie_too(auth, logged_in):
    thief = client_of(app_of(auth), cookies={auth._cookie: logged_in.cookies[auth._cookie]})
    assert thief.get("/").status_code == 200
    csrf = csrf_of(logged_in)
    assert logged_in.post("/logout").status_code == 403  # no page of another site logs anybody out
    assert logged_in.post("/logout", data={"csrf": csrf}).headers["location"] == "/login"
    assert thief.get("/").status_code == 303 and logged_in.get("/").status_code == 303


def test_a_new_login_begins_a_new_session(auth, logged_in):
    """A cookie that somebody put into the browser before is worth nothing after."""
    before = logged_in.cookies[auth._cookie]
    logged_in.get(f"/login?token={token_of(auth)}")
    assert logged_in.cookies[auth._cookie] != before
    assert client_of(app_of(auth), cookies={auth._cookie: before}).get("/").status_code == 303


def test_session_ends_with_its_hours_and_with_the_server(runs, monkeypatch):
    auth = Auth(DashboardConfig(runs=runs, session_hours=2))
    client = client_of(app_of(auth))
    client.get(f"/login?token={token_of(auth)}")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7000)
    assert client.get("/").status_code == 200
    cookie = client.cookies[auth._cookie]
    after = Auth(DashboardConfig(runs=runs, session_hours=2))
    assert client_of(app_of(after), cookies={auth._cookie: cookie}).get("/").status_code == 303
    monkeypatch.setattr(time, "time", lambda: now + 7300)
    assert client_of(app_of(auth), cookies={auth._cookie: cookie}).get("/").status_code == 303


def test_forms_of_other_sites_are_refused(auth, logged_in):
    csrf = csrf_of(logged_in)
    form = {"csrf": csrf, "a": "1"}
    answer = logged_in.post("/changes", data=form)
    assert answer.text == f"{form}"
    assert logged_in.post("/changes", data={"a": "1"}, headers={"x-csrf-token": csrf}).status_code == 200
    other = client_of(app_of(auth))
    other.get(f"/login?token={token_of(auth)}")
    for wrong in ("", "x", csrf_of(other), auth._signer.token("csrf:"), logged_in.cookies[auth._cookie]):
        assert logged_in.post("/changes", data={"csrf": wrong}).status_code == 403, wrong
    for headers in (
        {"origin": "http://evil.org"},
        {"origin": "null"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
    ):
        assert logged_in.post("/changes", data=form, headers=headers).status_code == 403, headers
    assert logged_in.post("/changes", data=form, headers={"origin": URL}).status_code == 200
    assert logged_in.post("/changes", content=b"a" * (1 << 17)).status_code == 413
    assert logged_in.post("/changes", content=b"a=1&" * 200).status_code == 400


def test_a_name_that_points_here_is_not_ours(runs, auth):
    """DNS rebinding: a page of evil.org, whose name now means 127.0.0.1, is of the same origin for the browser."""
    client = client_of(app_of(auth))
    for host in (
        "evil.org",
        "evil.org:6007",
        "127.0.0.1.evil.org",
        "localhost.evil.org",
        "10.0.0.1",
        "",
        "a b",
        "[::1",
    ):
        assert client.get("/login", headers={"host": host}).status_code == 400, host
    for host in ("localhost:8080", "127.0.0.1", "[::1]:6007", "LOCALHOST"):
        assert client.get("/login", headers={"host": host}).status_code == 200, host
    public = Auth(DashboardConfig(runs=runs, public_url="https://ml.example.org", allow_remote_token=True))
    client = client_of(app_of(public))
    assert client.get("/login", headers={"host": "ml.example.org"}).status_code == 200
    assert client.get("/login", headers={"host": "evil.org", "x-forwarded-host": "ml.example.org"}).status_code == 400
    everywhere = client_of(app_of(Auth(DashboardConfig(runs=runs, host="0.0.0.0", allow_remote_token=True))))
    assert everywhere.get("/login", headers={"host": "10.0.0.1:6007"}).status_code == 200
    assert everywhere.get("/login", headers={"host": "evil.org:6007"}).status_code == 400


@pytest.mark.parametrize(
    "target",
    "https://evil.org //evil.org /\\evil.org \\\\evil.org javascript:alert(1) evil.org /a\r\nx:y /\t/evil.org".split(
        " "
    ),
)
def test_nobody_is_sent_to_another_site(auth, target):
    client = client_of(app_of(auth))
    answer = client.get("/login", params={"token": token_of(auth), "next": target})
    assert answer.headers["location"] == "/" and "x" not in answer.headers


def test_path_prefix(runs):
    auth = Auth(
        DashboardConfig(
            runs=runs, path_prefix="/skyrl", public_url="https://ml.example.org/skyrl", allow_remote_token=True
        )
    )
    client = TestClient(app_of(auth, "/skyrl"), base_url="https://ml.example.org", follow_redirects=False, headers=HTML)
    link = re.search(r"https://\S+token=\S+", auth.announce(URL))[0]
    assert link.startswith("https://ml.example.org/skyrl/login?token=")
    refused = client.get("/skyrl/runs/first?a=1")
    assert refused.headers["location"] == "/skyrl/login?next=%2Fskyrl%2Fruns%2Ffirst%3Fa%3D1"
    assert client.get("/skyrl/login").text.count("/skyrl/static/") == 2
    assert client.get("/login").status_code in (303, 404) and client.get("/skyrllogin").status_code == 303
    answer = client.get(link + "&next=/elsewhere")
    assert answer.headers["location"] == "/skyrl/"
    assert "Path=/skyrl;" in answer.headers["set-cookie"] and "Secure" in answer.headers["set-cookie"]
    assert client.get("/skyrl/").text == "local sees /skyrl/"


def test_link_to_one_run(auth, logged_in, monkeypatch):
    csrf = csrf_of(logged_in)
    page = logged_in.post("/links", data={"csrf": csrf, "run": "first", "hours": "24"}).text
    link = re.search(r'readonly value="([^"]+)"', page)[1]
    assert link.startswith(f"{URL}/share?link=")
    guest = client_of(app_of(auth))
    assert guest.get(link).headers["location"] == "/runs/first"
    name = guest.get("/runs/first").text
    assert (
        re.fullmatch(r"link [0-9a-f]{16} sees /runs/first", name) and guest.get("/runs/first/series").status_code == 200
    )
    for path in (
        "/",
        "/compare",
        "/runs/first-longer",
        "/runs/second%20run",
        "/runs",
        "/runs/first/../second%20run",
        "/links",
    ):
        assert guest.get(path).status_code == 403, path
    assert guest.get("/runs/first/%2e%2e/second%20run").status_code == 404
    assert guest.post("/links", data={"run": "second run", "hours": "1"}).status_code == 403
    assert logged_in.get(link).status_code == 303 and logged_in.get("/").status_code == 200  # an admin stays one
    # After a restart it still opens its run, and a change of its text does not.
    restarted = Auth(auth._settings)
    late = client_of(app_of(restarted))
    assert late.get(link[:-1] + ("A" if link[-1] != "A" else "B")).status_code == 403
    assert late.get(link).status_code == 303 and late.get("/runs/first").status_code == 200
    # Taken back, it ends what it opened, in every server of these runs.
    revoke = re.search(r'name="revoke" value="([0-9a-f]+)"', page)[1]
    assert "opens nothing" in logged_in.post("/links", data={"csrf": csrf, "revoke": revoke}).text
    assert guest.get("/runs/first").status_code == 303 and late.get("/runs/first").status_code == 303
    refused = guest.get(link)
    assert refused.status_code == 403 and "taken back" in refused.text
    events = [line["event"] for line in audit_of(auth) if "event" in line]
    assert [event for event in events if "link" in event][-3:] == [
        "share link",
        "share link revoked",
        "share link refused",
    ]
    assert link.partition("link=")[2] not in (auth.state / "audit.jsonl").read_text()


def test_link_ends_by_itself(auth, logged_in, monkeypatch):
    link, token = auth.links.make("first", 0.5, "me")
    guest = client_of(app_of(auth))
    assert guest.get(f"/share?link={token}").status_code == 303 and guest.get("/runs/first").status_code == 200
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1801)
    assert guest.get("/runs/first").status_code == 303 and guest.get(f"/share?link={token}").status_code == 403
    assert auth.links.active() == []


@pytest.mark.parametrize(
    "run, hours",
    [
        ("", "1"),
        ("..", "1"),
        ("a/b", "1"),
        ("none", "1"),
        ("first", "0"),
        ("first", "nan"),
        ("first", "99999"),
        ("first", ""),
    ],
)
def test_links_that_cannot_be_made(logged_in, run, hours):
    answer = logged_in.post("/links", data={"csrf": csrf_of(logged_in), "run": run, "hours": hours})
    assert answer.status_code == 400 and 'role="status"' in answer.text and "readonly" not in answer.text


def test_headers_and_faults(auth, logged_in):
    for path, status in (("/", 200), ("/login", 200), ("/nothing", 404), ("/fails", 500), ("/login?token=x", 403)):
        answer = logged_in.get(path)
        assert answer.status_code == status
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["cache-control"] == "no-store" and answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin" and answer.headers["x-frame-options"] == "DENY"
        assert "secret" not in answer.text and "Traceback" not in answer.text
    assert not re.search(r"<script|<style|style=|\son\w+=", logged_in.get("/links").text)
    assert logged_in.get("/fails", headers={"accept": "application/json"}).json().keys() == {"detail"}


def test_audit_says_who_looked_at_what(auth, logged_in, monkeypatch):
    logged_in.get("/runs/first/series?metric=loss%0aforged")
    client_of(app_of(auth)).get("/runs/first")
    seen, refused = audit_of(auth)[-2:]
    assert (seen["viewer"], seen["role"], seen["path"], seen["status"]) == ("local", "admin", "/runs/first/series", 200)
    assert seen["query"] == "metric=loss%0aforged" and seen["address"]
    assert (refused["viewer"], refused["path"], refused["status"]) == (None, "/runs/first", 303)
    monkeypatch.setattr(auth_module, "AUDIT_BYTES", 10)
    logged_in.get("/")
    assert len(audit_of(auth)) == 1 and (auth.state / "audit.jsonl.1").exists()


def test_state_that_cannot_be_kept(runs, tmp_path, monkeypatch):
    auth = Auth(DashboardConfig(runs=runs))
    (auth.state / "key").write_text("no key")
    with pytest.raises(UserError, match="ends all share links"):
        Auth(DashboardConfig(runs=runs))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_STATE_HOME"):
        Auth(DashboardConfig(runs=runs))


OIDC = {"oidc_issuer": "https://id.example.org", "oidc_client_id": "me", "viewer_groups": ["us"]}
PUBLIC = {"public_url": "https://ml.example.org"}


@pytest.mark.parametrize(
    "given, words",
    [
        ({"host": "0.0.0.0"}, r"host=0\.0\.0\.0: a token alone"),
        ({"host": "node7"}, "allow_remote_token"),
        (PUBLIC, "public_url=https://ml.example.org: a token alone"),
        ({"public_url": "http://ml.example.org"}, "https://"),
        ({"public_url": "https://ml.example.org/a", "allow_remote_token": True}, "path_prefix"),
        ({"public_url": "https://me@ml.example.org", "allow_remote_token": True}, "without"),
        ({"session_hours": 0.0}, "session_hours"),
        ({"viewer_groups": ["us"]}, "viewer_groups: has an effect only with"),
        (OIDC, "public_url: empty"),
        (OIDC | PUBLIC | {"viewer_groups": []}, "nobody could come in"),
        (OIDC | PUBLIC | {"oidc_client_id": ""}, "oidc_client_id: empty"),
        (OIDC | PUBLIC | {"oidc_issuer": "http://id.example.org"}, "oidc_issuer"),
        (OIDC | PUBLIC | {"oidc_issuer": "https://[bad"}, "oidc_issuer"),
        (OIDC | PUBLIC | {"oidc_client_secret_file": "/nowhere/secret"}, "holds the client secret alone"),
    ],
)
def test_what_would_let_others_in_is_refused(runs, given, words):
    with pytest.raises(UserError, match=words) as told:
        Auth(DashboardConfig(runs=runs, **given))
    assert "\n" not in str(told.value)


def test_others_may_be_let_in_by_choice(runs):
    Auth(DashboardConfig(runs=runs, host="0.0.0.0", allow_remote_token=True))
    Auth(DashboardConfig(runs=runs, host="0.0.0.0", **OIDC, **PUBLIC))


def routes_of(routes, prefix=""):
    """(address with something in each parameter, methods) of every route, also below mounts."""
    for route in routes:
        if isinstance(route, Mount):
            yield from routes_of(route.routes, prefix + route.path)
        else:
            yield (
                re.sub(r"\{(\w+)[^}]*\}", lambda m: "first" if m[1] == "run" else "1", prefix + route.path),
                route.methods,
            )


@pytest.mark.parametrize("prefix", ["", "/skyrl"])
def test_every_route_of_the_dashboard_needs_a_login(runs, prefix):
    settings = DashboardConfig(runs=runs, path_prefix=prefix)
    auth = Auth(settings)
    app, _ = create_app(settings, auth, RunIndex(Path(runs)))
    client, found = client_of(app), dict(routes_of(app.routes))
    assert len(found) >= 20 and {f"{prefix}/", f"{prefix}/runs/first/rollouts/1/1/1", f"{prefix}/links"} <= found.keys()
    public = {f"{prefix}{path}" for path in ("/login", "/login/oidc", "/callback", "/share")}
    assert public <= found.keys()
    for path, methods in found.items():
        for method in methods - {"HEAD"} if path not in public else ():
            for headers, status in ((HTML, 303 if method == "GET" else 401), ({"accept": "*/*"}, 401)):
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == status, (method, path)
                assert status == 401 or answer.headers["location"].startswith(f"{prefix}/login?")
        if "POST" in methods and path not in public:  # and with a login a form of another session is refused
            insider = client_of(app)
            insider.get(f"{prefix}/login?token={token_of(auth)}")
            assert insider.post(path, data={"csrf": "x"}).status_code == 403, path


def test_a_link_to_one_run_opens_no_other_by_any_route(runs):
    settings = DashboardConfig(runs=runs)
    auth = Auth(settings)
    index = RunIndex(Path(runs))
    for entry in index._scan():
        index._refresh(entry)
    app, _ = create_app(settings, auth, index)
    guest = client_of(app)
    guest.get("/share?link=" + auth.links.make("first", 1, "me")[1])
    assert guest.get("/runs/first").status_code == 200
    for path, methods in dict(routes_of(app.routes)).items():
        other = path.replace("/first", "/first-longer")
        if "GET" in methods and path not in auth_module.PUBLIC:
            for address in {other if other != path else f"{path}?run=first&run=first-longer"}:
                answer = guest.get(address)
                assert answer.status_code == 403 and "shows the run first alone" in answer.text, address
    assert guest.get("/runs/first/config?with=first-longer").status_code == 403
    for tab in ("", "/rollouts", "/checkpoints", "/config", "/logs"):  # nor does a page name another
        assert "second run" not in guest.get(f"/runs/first{tab}").text


def test_a_live_page_ends_with_its_session(runs, monkeypatch):
    monkeypatch.setattr(board, "EVENT_SECONDS", 0.05)
    settings = DashboardConfig(runs=runs)
    auth, index = Auth(settings), RunIndex(Path(runs))
    for entry in index._scan():
        index._refresh(entry)
    app, _ = create_app(settings, auth, index)
    guest = client_of(app)
    link, token = auth.links.make("first", 1, "me")
    guest.get(f"/share?link={token}")
    threading.Timer(0.3, auth.links.revoke, [link.id]).start()
    answer = guest.get("/runs/first/events")  # which comes back when the stream has ended
    assert answer.status_code == 200 and answer.text.startswith("retry:")
    assert guest.get("/runs/first/events").status_code == 303
