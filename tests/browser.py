"""A headless Chromium for tests of pages, and a page in it that must neither fail nor call another machine.

Needs the package `playwright` and a Chromium of the system; without them the tests are skipped.
"""

import shutil
import urllib.parse

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT = 300_000   # milliseconds until an event must have come; a busy machine may take long
HERE = ("127.0.0.1", "localhost", "[::1]")


def expect(what):
    """Returns playwright's assertions, which wait for a page to get there."""
    from playwright import sync_api
    sync_api.expect.set_options(timeout=WAIT)
    return sync_api.expect(what)


def launch(driver):
    """Returns the system's Chromium, without a window."""
    return driver.chromium.launch(executable_path=next(filter(None, map(shutil.which, NAMES))), args=[
        "--no-sandbox", "--disable-dev-shm-usage",   # as root and in containers
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"])


@pytest.fixture(scope="session")
def chromium():
    """A browser that resolves no name but this machine's."""
    pytest.importorskip("playwright", reason="needs the package playwright")
    from playwright import sync_api
    if not any(map(shutil.which, NAMES)):
        pytest.skip("needs a Chromium (apt-get install chromium)")
    with sync_api.sync_playwright() as driver:
        browser = launch(driver)
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium):
    """Opens pages; at the end none of them may have logged an error or asked another machine.

    `new_page.excused` holds parts of messages of errors that a test provokes.
    """
    contexts, problems = [], []

    def watch(request):
        url = urllib.parse.urlsplit(request.url)
        if url.scheme not in ("data", "blob", "file", "about") and url.hostname not in HERE:
            problems.append(f"a request of {request.url}")

    def note(message):
        if message.type == "error":
            problems.append(f"console: {message.text}")

    def make(**options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(WAIT)
        contexts.append(context)
        page = context.new_page()
        page.on("request", watch)
        page.on("console", note)
        page.on("pageerror", lambda error: problems.append(f"uncaught: {error}"))
        return page

    make.excused = []
    yield make
    for context in contexts:
        context.close()
    left = [one for one in problems if not any(text in one for text in make.excused)]
    assert not left, left
