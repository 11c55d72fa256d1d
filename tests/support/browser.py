"""Chromium, to look at the page with: `playwright` drives Debian's, or what `playwright install` has brought."""

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
    """Skips the test where there is none, but not in CI."""
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        if path is None and not Path(playwright.chromium.executable_path).exists() and not os.environ.get("CI"):
            pytest.skip("chromium is not installed")
        # Root, as in containers, has no sandbox; what is looked at is the server's own.
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=os.getuid() != 0)
        yield browser
        browser.close()
