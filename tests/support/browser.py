"""Chromium for tests of the page: Debian's, or the one that `playwright install` has installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright


@contextmanager
def chromium() -> Iterator[Browser]:
    """A running Chromium. Skips the test where there is none, except in CI."""
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        if path is None and not Path(playwright.chromium.executable_path).exists() and not os.environ.get("CI"):
            pytest.skip("chromium is not installed")
        # Root, as in containers, cannot use the sandbox. The page is the server's own.
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=os.getuid() != 0)
        yield browser
        browser.close()
