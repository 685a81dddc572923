"""A real browser without a window, spoken to over a pipe (the DevTools protocol), so that nothing needs installing."""

import base64
import json
import os
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find():
    """The browser's program, or None."""
    given = os.environ.get("ZOO_BROWSER")
    return given or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page in a browser; use as a context manager."""

    def __init__(self, program, page, folder, size=(1280, 900)):
        hears, tells = os.pipe(), os.pipe()
        # The browser reads commands from 3 and writes answers to 4.
        shell = f'exec "$@" 3<&{hears[0]} 4>&{tells[1]}'
        words = [
            program,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]
        words += ["--remote-debugging-pipe", f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}"]
        words += ["--host-resolver-rules=MAP * ~NOTFOUND", "about:blank"]  # nothing outside can be reached
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "browser", *words],
            pass_fds=(hears[0], tells[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(hears[0])
        os.close(tells[1])
        self._out, self._in = os.fdopen(hears[1], "wb", buffering=0), os.fdopen(tells[0], "rb")
        self._rest, self._number, self.requests = b"", 0, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Network.enable")
        self.call("Page.enable")
        self.call("Page.navigate", url=page)
        self.until("document.readyState == 'complete'")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self._out.close()
        self._in.close()

    def call(self, method, **parameters):
        """One command; returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            found = json.loads(self._next())
            if found.get("method") == "Network.requestWillBeSent":
                self.requests.append(found["params"]["request"]["url"])
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]

    def _next(self):
        while b"\0" not in self._rest:
            part = os.read(self._in.fileno(), 2**20)
            assert part, "the browser has ended"
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return message

    def ask(self, script):
        """The value of an expression in the page."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def until(self, script, seconds=20):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.ask(script):
            assert time.monotonic() < end, script
            time.sleep(0.05)

    def mouse(self, kind, x, y):
        """Press the left button, move with it, release it, or hover without it."""
        words = {"down": "mousePressed", "up": "mouseReleased"}
        held = int(kind in ("down", "move"))
        self.call(
            "Input.dispatchMouseEvent",
            type=words.get(kind, "mouseMoved"),
            x=x,
            y=y,
            button="none" if kind == "hover" else "left",
            buttons=held,
            clickCount=1,
        )

    def touch(self, kind, *point):
        """Put a finger down, move it or lift it."""
        words = {"down": "touchStart", "move": "touchMove", "up": "touchEnd"}
        points = [{"x": point[0], "y": point[1]}] if point else []
        self.call("Input.dispatchTouchEvent", type=words[kind], touchPoints=points)

    def key(self, name):
        """Press and release a key."""
        codes = {"ArrowRight": 39, "ArrowLeft": 37, "Tab": 9, "Home": 36, "End": 35}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=codes[name])

    def screenshot(self):
        """PNG bytes of what is in the window."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
