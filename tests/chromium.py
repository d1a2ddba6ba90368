"""A headless Chromium, driven through its debugging pipe: messages are JSON that ends in a NUL
byte.
"""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

PROGRAM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
_DEADLINE_S = 120.0


class Browser:
    """Context manager with one page of a given width.

    `errors` gathers what the page's console complains of.
    """

    def __init__(self, profile: Path, width: int, height: int = 900, dark: bool = False):
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars "
            f'--remote-debugging-pipe --user-data-dir="{profile}"'
        )
        pipes = f'3<&{read} 4>&{write} 2>"{profile}.log"'
        command = f'exec "{PROGRAM}" {flags} about:blank {pipes}'
        self._process = subprocess.Popen(["bash", "-c", command], pass_fds=(read, write))
        os.close(read)
        os.close(write)
        self._buffer, self._numbers, self.errors, self.requests = b"", itertools.count(1), [], []
        self._session = None
        (target,) = [
            t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"
        ]
        self._session = self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **params):
        """The result of a command of the DevTools protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | (
            {"sessionId": self._session} if self._session else {}
        )
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != number:
            pass
        assert "result" in answer, answer
        return answer["result"]

    def open(self, page: Path) -> None:
        """Shows a file, and waits until it is loaded and painted."""
        self.call("Page.navigate", url=page.as_uri())
        while not self.run("document.readyState === 'complete' && location.protocol === 'file:'"):
            time.sleep(0.05)
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script: str):
        """The value of a JavaScript expression."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        shot = self.call(
            "Page.captureScreenshot",
            captureBeyondViewport=whole,
            **({"clip": self._whole()} if whole else {}),
        )
        path.write_bytes(base64.b64decode(shot["data"]))

    def _whole(self) -> dict:
        return self.call("Page.getLayoutMetrics")["cssContentSize"] | {"scale": 1}

    def _message(self) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], _DEADLINE_S)
            chunk = os.read(self._read, 1 << 20) if ready else b""
            assert chunk, f"{PROGRAM} has died or hangs"
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        details = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown" or (
            message.get("method") == "Runtime.consoleAPICalled"
            and details["type"] in ("error", "warning")
        ):
            self.errors.append(str(details))
        if message.get("method") == "Log.entryAdded" and details["entry"]["level"] in (
            "error",
            "warning",
        ):
            self.errors.append(str(details["entry"]))
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        return message
