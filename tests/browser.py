"""Control a headless Chromium over its DevTools protocol: open, inspect, click and print pages."""

import asyncio
import base64
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
# Under CI what needs a browser fails without one, or nobody would see that a test has gone.
MAY_BE_SKIPPED = CHROMIUM is None and not os.environ.get("CI")
START_SECONDS = 60
END_SECONDS = 20


class Page:
    """One tab. It records console messages and network requests."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._socket, self._sent = loop, socket, 0
        self.width = 0  # pixels, as last set
        self.complaints: list[str] = []  # errors, warnings and whatever else the console was told
        self.requests: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command of the protocol and return its result."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), START_SECONDS))

    def open(self, path: Path) -> None:
        """Load a file and wait until it is complete."""
        self.visit(path.as_uri())

    def visit(self, url: str) -> None:
        """Load an address and wait until it is complete."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        protocol = url.split(":")[0] + ":"
        self.wait_for(f"document.readyState + location.protocol === {'complete' + protocol!r}", url)

    def wait_for(self, condition: str, what: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + START_SECONDS
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"{what} did not come in {START_SECONDS} s"
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        """Set the screen's size in pixels. Widths below 600 emulate a phone."""
        self.width = width
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def set_dark(self, dark: bool) -> None:
        """Set the system's preference for a dark or light scheme."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def click(self, selector: str, at: tuple[float, float] = (0.5, 0.5)) -> None:
        """Click on an element, at a position given as fractions of its width and height."""
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })()"
        )
        place = {"x": box[0] + at[0] * box[2], "y": box[1] + at[1] * box[3], "button": "left", "clickCount": 1}
        for kind, buttons in (("mousePressed", 1), ("mouseReleased", 0)):
            self.call("Input.dispatchMouseEvent", type=kind, buttons=buttons, **place)

    def screenshot(self) -> bytes:
        """Return the full page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def printed(self) -> bytes:
        """Return the page as PDF."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._sent += 1
        await self._socket.send_json({"id": self._sent, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._sent:
                assert "error" not in message, message
                return message["result"]
            self._note(message["method"], message["params"])

    def _note(self, event: str, told: dict[str, Any]) -> None:
        if event in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(str(told))
        if event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Start a Chromium with one empty tab and end it afterwards. `profile` is a folder for its files."""
    assert CHROMIUM is not None, "there is no Chromium here: apt-get install chromium"
    flags = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--disable-gpu"]
    flags += ["--no-first-run", "--disable-background-networking", "--hide-scrollbars"]
    flags += ["--no-sandbox"] * (os.geteuid() == 0)  # Chromium refuses root otherwise
    with subprocess.Popen(
        [CHROMIUM, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        loop = asyncio.new_event_loop()
        try:
            port = _port(profile / "DevToolsActivePort", process)
            session, socket = loop.run_until_complete(_connect(port))
            try:
                yield Page(loop, socket)
            finally:
                loop.run_until_complete(session.close())
        finally:
            _end(process)
            loop.close()


def _end(process: subprocess.Popen) -> None:
    """End the browser and its child processes, which would otherwise write into the profile during its removal."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    _, left = psutil.wait_procs(family, timeout=END_SECONDS)
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(left, timeout=END_SECONDS)


def _port(file: Path, process: subprocess.Popen) -> int:
    deadline = time.monotonic() + START_SECONDS
    while not (file.is_file() and file.read_text().count("\n")):
        assert process.poll() is None and time.monotonic() < deadline, "Chromium did not start"
        time.sleep(0.05)
    return int(file.read_text().splitlines()[0])


async def _connect(port: int) -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
    session = aiohttp.ClientSession()
    async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
        tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
    return session, await session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0)
