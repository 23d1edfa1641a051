"""A headless Chromium that opens a page and says what happened there."""

import base64
import contextlib
import json
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import Request, urlopen

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0")
_PATIENCE_S = 120


@dataclass
class Seen:
    """What a browser has done for a page."""

    requests: list = field(default_factory=list)
    """Addresses, but for the page itself."""
    problems: list = field(default_factory=list)
    """Of the console and the log."""


@contextlib.contextmanager
def browser(folder):
    """Start Chromium, and yield a function that opens a file in it."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = Path(folder, "DevToolsActivePort")
        deadline = time.monotonic() + _PATIENCE_S
        while not port_file.is_file() or not port_file.read_text().strip():
            assert process.poll() is None, "Chromium has ended"
            assert time.monotonic() < deadline, "Chromium does not start"
            time.sleep(0.1)
        port = int(port_file.read_text().split()[0])
        with urlopen(Request(f"http://127.0.0.1:{port}/json/new", method="PUT"), timeout=_PATIENCE_S) as told:
            yield Tab(json.load(told)["webSocketDebuggerUrl"])
    finally:
        process.terminate()
        process.wait(30)


class Tab:
    """A page, by the DevTools protocol."""

    def __init__(self, address):
        import websocket

        self._socket = websocket.create_connection(address, timeout=_PATIENCE_S, suppress_origin=True)
        self._number, self.seen = 0, Seen()
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **params):
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while (told := json.loads(self._socket.recv())).get("id") != self._number:
            self._note(told)
        assert "error" not in told, told
        return told["result"]

    def open(self, path, *, width, media="screen", scheme="light"):
        """Open a file as wide as asked for, and return what the browser asked and complained of."""
        self.seen = Seen()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=features)
        self.ask("Page.navigate", url=path.as_uri())
        while self.evaluate("document.readyState + location.href") != f"complete{path.as_uri()}":
            time.sleep(0.05)
        own = (path.as_uri(), "data:")
        self.seen.requests = [each for each in self.seen.requests if not each.startswith(own)]
        return self.seen

    def evaluate(self, expression):
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, path):
        """Write a PNG of the whole page."""
        told = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))

    def _note(self, told):
        method, params = told.get("method"), told.get("params", {})
        if method == "Network.requestWillBeSent":
            self.seen.requests.append(params["request"]["url"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.seen.problems.append(str(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.seen.problems.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.seen.problems.append(params["entry"]["text"])
