"""A headless Chromium, the built book over http and file://, and a page that reports what it loads and says."""

from __future__ import annotations

import functools
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from built_book import built_book

OWN = ("", "127.0.0.1")


@pytest.fixture(scope="session")
def chromium():
    """A browser process; without one the tests are skipped, except on continuous integration, where they fail."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        reason = f"none of {', '.join(names)} is on PATH; `make browser` installs one where it may"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and writes no log."""

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="session")
def address():
    """Addresses of the built pages: address("http") and address("file")."""
    html = built_book()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=html))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"http": f"http://127.0.0.1:{server.server_port}", "file": html.as_uri()}.__getitem__
    server.shutdown()
    server.server_close()


@pytest.fixture
def open_page(chromium):
    """open(url, **context) -> a page whose `foreign` lists requests to other hosts and `complaints` console errors."""
    contexts = []

    def open_(url: str, **context):
        contexts.append(chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | context))
        page = contexts[-1].new_page()
        page.foreign, page.complaints = [], []
        page.on("request", lambda request: page.foreign.append(request.url)
                if (urlsplit(request.url).hostname or "") not in OWN else None)
        page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
