"""The failpoints of a server process: a folder of files, which the server reads while it runs."""

from __future__ import annotations

from pathlib import Path

from tests.support.servers import wait_for

HUB_SECONDS = 4
"""Patience of servers with their Hub, in seconds."""


class Failpoints:
    """Sets and clears the failpoints of servers that are started with `env`."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder."""
        folder.mkdir()
        self.folder = folder
        """The folder that servers find in LORAREP_FAILPOINTS."""
        self.env = {"LORAREP_FAILPOINTS": str(folder), "HF_HUB_DOWNLOAD_TIMEOUT": str(HUB_SECONDS)}
        """The environment variables of a server that obeys the failpoints and soon gives up on its Hub."""

    def set(self, name: str, action: str) -> None:
        """Sets the action of a failpoint, such as "hold", "error" or "sleep 0.05"."""
        (self.folder / f"{name}.reached").unlink(missing_ok=True)
        # A rename is atomic: the server never reads half an action.
        new = self.folder / f"{name}.new"
        new.write_text(action)
        new.rename(self.folder / name)

    def wait_reached(self, name: str) -> None:
        """Waits until a server has reached a failpoint since it was set."""
        wait_for((self.folder / f"{name}.reached").exists, f"the failpoint {name}")

    def unset(self, name: str) -> None:
        """Removes the action of one failpoint."""
        (self.folder / name).unlink()

    def clear(self) -> None:
        """Removes all actions. An action that acts once may disappear by itself."""
        for file in self.folder.iterdir():
            file.unlink(missing_ok=True)
