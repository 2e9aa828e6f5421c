"""A headless browser for tests: Chromium by its DevTools protocol over a pipe, nothing installed.

The environment variable ``HESSOPS_BROWSER`` names the browser to use. Where it is set, tests that
need one fail rather than be skipped when it is not there.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
VARIABLE = "HESSOPS_BROWSER"
SECONDS = 60  # a limit for a browser that hangs, never waited for otherwise


def browser_path() -> str | None:
    """The browser, or ``None`` where there is none and none is demanded.

    Raises:
        FileNotFoundError: The one that is demanded is not there.
    """
    demanded = os.environ.get(VARIABLE)
    if demanded:
        found = shutil.which(demanded)
        if found is None:
            raise FileNotFoundError(f"{VARIABLE} demands {demanded!r}, which is not there")
        return found
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A browser with one tab.

    Attributes:
        events: All that it told beyond answers: requests, messages of the console, errors.
    """

    def __init__(self, executable: str, folder: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._pending, self._last_id, self._session = b"", 0, None
        self._folder = folder
        self._pid, self._to, self._from = _started(executable, folder)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log", "Audits"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """The answer to a command; what is told meanwhile is added to `events`."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method: str) -> None:
        """Reads until an event came that has not been read before."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._message())

    def _message(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._from], [], [], max(0, end - time.monotonic()))
            some = os.read(self._from, 2**16) if ready else b""
            if not some:
                log = (self._folder / "log").read_text("utf-8", "replace")
                raise RuntimeError(f"the browser is gone or hangs:\n{log[-2000:]}")
            self._pending += some
        first, _, self._pending = self._pending.partition(b"\0")
        return json.loads(first)

    def show(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> Self:
        """Opens a file at a width in CSS pixels, and waits until all of it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait_for("Page.loadEventFired")
        return self

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    @property
    def requests(self) -> list[str]:
        """What the page asked for, without what lies in the page itself."""
        urls = [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """What the console, the log, and the checks of the browser say."""
        told = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        kinds = (*told, "Audits.issueAdded", "Network.loadingFailed")
        return [event["params"] for event in self.events if event.get("method") in kinds]

    def close(self) -> None:
        """Ends the browser and all of its processes."""
        self._session = None
        try:
            self.call("Browser.close")
        except (OSError, RuntimeError):
            os.killpg(self._pid, signal.SIGKILL)
        finally:
            os.close(self._to)
            os.close(self._from)
            os.waitpid(self._pid, 0)


def _started(executable: str, folder: Path) -> tuple[int, int, int]:
    """The id of a browser, a pipe to it and one from it."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # It expects them as 3 and 4; away from there first, so that neither overwrites the other.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    command = [
        executable,
        "--headless=new",
        "--no-sandbox",  # which does not work as root in a container
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
        "--force-color-profile=srgb",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder / 'profile'}",
        "about:blank",
    ]
    actions = [
        (os.POSIX_SPAWN_DUP2, ends[0], 3),
        (os.POSIX_SPAWN_DUP2, ends[1], 4),
        (os.POSIX_SPAWN_DUP2, log, 1),
        (os.POSIX_SPAWN_DUP2, log, 2),
    ]
    # Not by subprocess, which cannot number pipes without running code in a fork of many threads.
    pid = os.posix_spawn(executable, command, os.environ, file_actions=actions, setpgroup=0)
    for end in (theirs_in, theirs_out, *ends, log):
        os.close(end)
    return pid, ours_out, ours_in


@contextmanager
def opened_browser(folder: Path) -> Iterator[Browser]:
    """A browser with its profile in a folder, ended afterwards.

    Raises:
        FileNotFoundError: As of `browser_path`, or there is none.
    """
    executable = browser_path()
    if executable is None:
        raise FileNotFoundError(f"no browser found: {', '.join(NAMES)}")
    browser = Browser(executable, folder)
    try:
        yield browser
    finally:
        browser.close()
