"""The dashboard as a person has it: a real headless Chromium, the real command, a real provider (make test-browser).

Whatever a page does here, it asks no other host for anything, breaks no rule of its content policy, logs no error and
opens no dialog: `browse` looks at all of that when a test ends.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from provider import running_provider
from viewing import HTML, add_rollouts, add_system, make_run

pytestmark = pytest.mark.browser
if os.environ.get("SKYRL_TEST_BROWSER") != "1":
    pytest.skip("a real Chromium is for make test-browser", allow_module_level=True)
from playwright.sync_api import expect, sync_playwright  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
TAG = "<b>tag</b>"
NAME = "a=1,b c&d"  # a folder's name that has to be quoted
PAGES = ["/", "/compare", f"/compare?run={quote(NAME)}&run=low", "/links"] + [
    f"/runs/{quote(NAME, safe='')}{tab}"
    for tab in ("", "/rollouts", "/checkpoints", "/config?with=low", "/logs", "/phases")
]
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="session")
def chromium():
    program = os.environ.get("SKYRL_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "no Chromium: install Debian's chromium, or name one in SKYRL_CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "runs"
    run = make_run(folder, NAME, f"tracking.tags=['{TAG}']", steps=60, slope=0.01)
    add_rollouts(run)
    add_system(run)
    (run / "slurm.out").write_text(f"a line\n{HTML}\n")
    make_run(folder, "low", "optim.lr=1e-5", steps=60, slope=0.005)
    return folder


@contextlib.contextmanager
def dashboard(runs, state, *options, cwd=ROOT):
    """The first line that `skyrl-tx dashboard` prints, while it serves; then what it said besides."""
    environment = {**os.environ, "XDG_STATE_HOME": str(state / "state"), "XDG_CACHE_HOME": str(state / "cache")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "skyrl", "dashboard", *runs, *options]
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("dashboard: http"), line + process.stdout.read()
        yield line
    finally:
        process.terminate()
        said = process.communicate(timeout=30)[0]
    assert "Traceback" not in said and process.returncode == 0, said


@pytest.fixture(scope="session")
def link(runs, tmp_path_factory):
    with dashboard([str(runs)], tmp_path_factory.mktemp("state"), "--port", "0") as line:
        yield re.search(r"http\S+", line)[0]


@pytest.fixture
def browse(chromium, link):
    """`browse(**context)` is a page of a browser of its own, which is watched."""
    wrong, contexts, hosts = [], [], {urlsplit(link).netloc}

    def new(*, also=(), elsewhere=(), expect_errors=(), **given):
        """also: hosts of dashboards; elsewhere: those of others, whose own pages may do as they like."""
        hosts.update(also, elsewhere)
        context = chromium.new_context(base_url=given.pop("base_url", link.partition("/login")[0]), **given)
        contexts.append(context)
        page = context.new_page()

        def asked(request):
            parts = urlsplit(request.url)
            if parts.scheme != "data" and parts.netloc not in hosts and urlsplit(page.url).netloc not in elsewhere:
                wrong.append(f"{page.url} asks {request.url}")

        def said(message):
            expected = urlsplit(page.url).netloc in elsewhere or any(word in message.text for word in expect_errors)
            if message.type == "error" and not expected:
                wrong.append(f"{page.url}: {message.text}")

        context.on("request", asked)
        page.on("console", said)
        page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"{page.url}: a dialog"), dialog.dismiss()))
        return page

    yield new
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="session")
def cookies(chromium, link):
    """Those of a browser that has logged in with the printed link, which is spent now."""
    context = chromium.new_context()
    page = context.new_page()
    page.goto(link)
    assert page.url == link.partition("login")[0] and page.locator("h1").inner_text().startswith("Runs")
    assert page.evaluate("document.cookie") == "" and page.evaluate("document.referrer") == ""
    assert "token" not in page.content()
    found = context.cookies()
    assert [(one["httpOnly"], one["sameSite"]) for one in found] == [(True, "Lax")]
    context.close()
    return found


@pytest.fixture
def page(browse, cookies):
    found = browse()
    found.context.add_cookies(cookies)
    return found


def test_login(browse, cookies, link):
    page = browse(expect_errors=("403",))
    page.goto("/runs/low")
    assert "/login?next=%2Fruns%2Flow" in page.url
    page.get_by_label("Token").fill("not this one")
    page.keyboard.press("Enter")
    assert "wrong or was used" in page.get_by_role("alert").inner_text()
    page.goto(link)
    assert "was used" in page.get_by_role("alert").inner_text()  # it logged in once, for `cookies`


def test_every_page_on_a_laptop_and_a_phone(page):
    for size in ({"width": 1280, "height": 800}, PHONE):
        page.set_viewport_size(size)
        for path in PAGES:
            page.goto(path)
            page.wait_for_load_state("load")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= size["width"], (path, size, wide)
            assert page.locator("h1").count() == 1 and page.locator("html").get_attribute("lang") == "en"


REACHED = "a, button, input:not([type=hidden]), select, summary, [tabindex='0'], img"
NAMELESS = """reached => [...document.querySelectorAll(reached)]
  .filter(e => e.offsetParent && !((e.getAttribute('aria-label') || e.innerText || e.alt || e.title
    || [...(e.labels || [])].map(l => l.innerText).join('')).trim()
    || e.getAttribute('aria-labelledby') || e.querySelector('[aria-label], title')))
  .map(e => e.outerHTML.slice(0, 120))"""


def test_all_that_can_be_reached_has_a_name(page):
    for path in PAGES:
        page.goto(path)
        page.wait_for_load_state("load")
        assert page.evaluate(NAMELESS, REACHED) == [], path


def focused(page):
    return page.evaluate(
        "(e => [e.tagName, (e.innerText || e.name || '').trim().split('\\n')[0], getComputedStyle(e).outlineStyle])"
        "(document.activeElement)"
    )


def test_by_keyboard_alone(page):
    page.goto("/")
    page.keyboard.press("Tab")
    assert focused(page)[1] == "To the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("/")
    assert focused(page)[:2] == ["INPUT", "q"]
    page.keyboard.type("b c&d")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"[?&]q="))
    assert page.locator("tbody tr").count() == 1
    for _ in range(30):
        page.keyboard.press("Tab")
        tag, text, outline = focused(page)
        assert tag != "BODY" and outline != "none", (tag, text)  # where one is can be seen at any time
        if text == NAME:
            break
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/runs/"))
    assert page.locator("h1").inner_text() == NAME
    for tab in ("Rollouts", "Config", "Logs"):
        page.get_by_role("link", name=tab, exact=True).first.focus()
        page.keyboard.press("Enter")
        page.wait_for_url(re.compile(tab.lower()))


CONTRAST = """() => {
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = text => { const c = text.match(/[\\d.]+/g).slice(0, 3).map(v => linear(Number(v) / 255));
    return .2126 * c[0] + .7152 * c[1] + .0722 * c[2]; };
  const ground = e => { for (; e; e = e.parentElement) { const b = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$|transparent/.test(b)) return b; } return 'rgb(255, 255, 255)'; };
  return [...document.querySelectorAll('main :is(h1, h2, p, a, td, th, button, label, small, dt, dd, span)')]
    .filter(e => e.offsetParent && e.innerText.trim()).map(e => {
      const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
      return [(a + .05) / (b + .05), e.outerHTML.slice(0, 120)]; }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(page, scheme):
    """Contrast of text is at least 4.5, as WCAG 2.1 asks (1.4.3)."""
    page.emulate_media(color_scheme=scheme)
    for path in PAGES:
        page.goto(path)
        page.wait_for_load_state("load")
        assert page.evaluate(CONTRAST) == [], path
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark")


def test_markup_in_rollouts_is_text(page):
    page.goto(f"/runs/{quote(NAME, safe='')}/rollouts")
    assert HTML in page.locator("main").inner_text()
    page.locator(".episodes a").first.click()
    page.wait_for_load_state("load")
    assert page.locator("main script, main img").count() == 0
    page.goto(f"/runs/{quote(NAME, safe='')}/logs/slurm.out")
    assert HTML in page.locator("main").inner_text() and page.locator("main img").count() == 0
    page.goto("/")
    assert TAG in page.locator("main").inner_text() and page.locator("main b").count() == 0


def test_charts_are_drawn_and_a_page_follows_its_run(page, runs):
    page.goto("/runs/low")
    page.wait_for_selector("canvas")
    drawn = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v)"
    assert page.locator("canvas").first.evaluate(drawn)
    with open(runs / "low" / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps({"step": 61, "phase": "rl", "reward:mean": 0.9}) + "\n")
    expect(page.locator("main dd").first).to_contain_text("61", timeout=60_000)


def test_link_to_one_run(page, browse):
    page.goto(f"/runs/{quote(NAME, safe='')}")
    page.get_by_role("link", name="Share").click()
    assert page.get_by_label("Run").input_value() == NAME
    page.get_by_role("button", name="Make a link").click()
    shared = page.get_by_label("Copy it now").input_value()
    guest = browse(expect_errors=("403",))
    guest.goto(shared)
    assert "link=" not in guest.url and guest.locator("h1").inner_text() == NAME
    assert guest.get_by_role("link", name="Compare", exact=True).count() == 0
    guest.goto("/runs/low")
    assert "alone" in guest.get_by_role("alert").inner_text()
    page.get_by_role("button", name="Revoke").first.click()
    guest.goto(f"/runs/{quote(NAME, safe='')}")
    assert "/login" in guest.url


def test_logout(browse, cookies, link):
    page = browse(expect_errors=("429",))
    page.goto("/login")
    page.get_by_role("button", name="Print another").click()
    assert "was printed" in page.get_by_role("alert").inner_text()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_sign_in_on_the_page_of_a_provider(browse, runs, tmp_path):
    with running_provider() as (provider, issuer):
        provider.add_user("alice", email="alice@example.org", groups=["ml"])
        provider.add_user("mallory", email="mallory@example.org", groups=["sales"])
        port = free_port()
        url = f"http://127.0.0.1:{port}/skyrl"
        options = [f"oidc_issuer={issuer}", "oidc_client_id=skyrl", "viewer_groups=[ml]", f"public_url={url}"]
        (tmp_path / "secret").write_text("hush")  # this provider knows no public clients
        options.append(f"oidc_client_secret_file={tmp_path / 'secret'}")
        given = [f"dashboard.{option}" for option in options]
        with dashboard([str(runs)], tmp_path, "--port", str(port), "--path-prefix", "/skyrl", *given) as line:
            assert line.strip() == f"dashboard: {url}"
            provided, ours = urlsplit(issuer).netloc, urlsplit(url).netloc
            page = browse(base_url=url, also=[ours], elsewhere=[provided], expect_errors=("403",))
            for user in ("mallory", "alice"):
                page.goto(f"{url}/runs/low")
                page.get_by_role("link", name="Sign in").click()
                page.wait_for_url(re.compile("authorize"))
                page.locator("input[name=sub]").fill(user)
                page.keyboard.press("Enter")
                page.wait_for_url(re.compile("^" + url))
                if user == "mallory":
                    assert "mallory@example.org, who is in no group" in page.get_by_role("alert").inner_text()
            assert page.url == f"{url}/runs/low" and page.locator("h1").inner_text() == "low"
            assert "alice@example.org" in page.locator(".who").inner_text()
            assert page.get_by_role("link", name="Share").count() == 0  # a viewer makes no links
            page.get_by_role("button", name="Log out").click()
            assert page.url == f"{url}/login"
            page.goto(f"{url}/runs/low")
            assert "/login?next" in page.url


def test_pictures_of_the_documentation(browse, tmp_path):
    """The images that the pages show, of the recorded runs that come with skyrl. SKYRL_WRITE_IMAGES=1 keeps them, to be
    looked at before they are committed."""
    shutil.copytree(ROOT / "skyrl" / "dashboard" / "demo", tmp_path / "runs")
    laptop, run = {"width": 1280, "height": 860}, "/runs/objectives-seed1"
    with dashboard(["runs"], tmp_path, "--port", "0", cwd=tmp_path) as line:
        link = re.search(r"http\S+", line)[0]
        home = link.partition("/login")[0]
        page = browse(also=[urlsplit(link).netloc], base_url=home)
        page.goto(link)
        page.wait_for_selector("tbody tr")
        page.goto(home + "/runs/guess_number-seed1/rollouts?dump=000016")
        episode = urlsplit(page.locator(".episodes a").first.get_attribute("href")).path
        shots = [("-runs", "/", "light", laptop), ("", run, "light", laptop), ("-phone", run, "dark", PHONE)]
        shots.append(("-episode", episode, "light", laptop))
        for name, path, scheme, size in shots:
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size(size)
            page.goto(home + path)
            page.wait_for_load_state("load")
            if path == run:
                page.wait_for_selector("canvas")
            page.wait_for_timeout(500)  # curves that come into view are drawn
            shot = tmp_path / f"dashboard{name}.png"
            page.screenshot(path=shot)
            assert 5_000 < shot.stat().st_size < 200_000
            if os.environ.get("SKYRL_WRITE_IMAGES") == "1":
                shutil.copy(shot, IMAGES / shot.name)
        page.goto("about:blank")  # a live page would ask for the dashboard that ends here
