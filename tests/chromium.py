"A headless Chromium driven over the DevTools protocol: one class, no npm. The websocket client comes with JupyterLab."
import base64, json, os, shutil, signal, subprocess, tempfile, time
from itertools import count
from pathlib import Path
from urllib.request import Request, urlopen

import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
         "--autoplay-policy=no-user-gesture-required", "--remote-debugging-port=0", "--remote-allow-origins=*"]


class Page:
    "A page: `open` it, `evaluate` JavaScript in it, read its `errors` and `requests`."

    def __enter__(self):
        self.profile, self.ids, self.events = tempfile.mkdtemp(), count(1), []
        own = [f"--user-data-dir={self.profile}", "--window-size=1200,2000", "about:blank"]
        self.process = subprocess.Popen([CHROMIUM, *FLAGS, *own], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        start_new_session=True)
        try:
            written = Path(self.profile)/"DevToolsActivePort"
            port = self.wait(lambda: written.read_text("utf-8").split()[0], "Chromium's port",
                             errors=(OSError, IndexError))
            def pages_of():
                return [tab for tab in json.load(urlopen(f"http://127.0.0.1:{port}/json")) if tab["type"] == "page"]
            pages, self.port = self.wait(pages_of, "a page", errors=(OSError,)), port
            self.connect(pages[0])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGKILL)   # the group this test started
        self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def connect(self, tab):
        self.socket = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=180)
        for domain in ("Page", "Runtime", "Log", "Network"): self.send(f"{domain}.enable")

    def another(self):
        "One more tab of this browser; it goes with it."
        tab = Page()
        tab.ids, tab.events, tab.port = count(1), [], self.port
        tab.connect(json.load(urlopen(Request(f"http://127.0.0.1:{self.port}/json/new?about:blank", method="PUT"))))
        for each in (self, tab): each.send("Emulation.setFocusEmulationEnabled", enabled=True)
        return tab

    def wait(self, ask, what, seconds=180, errors=()):
        "The first true answer of `ask`."
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if answer := ask(): return answer
            except errors: pass
            time.sleep(.1)
        raise TimeoutError(f"no {what} in {seconds} s")

    def send(self, method, **params):
        "One command and its result; events on the way are kept."
        number = next(self.ids)
        self.socket.send(json.dumps(dict(id=number, method=method, params=params)))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.events.append(message)

    def open(self, path):
        self.send("Page.navigate", url=Path(path).resolve().as_uri())
        self.until("document.readyState == 'complete'")

    def evaluate(self, expression):
        "The value of a JavaScript expression, awaited."
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression, seconds=180): return self.wait(lambda: self.evaluate(expression), expression, seconds)

    def press(self, key):
        "A key, as a keyboard sends it: what has the focus hears it."
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, "Tab": 9}.get(key) or ord(key.upper())
        own = dict(key=key, windowsVirtualKeyCode=code, **({"text": key} if len(key) == 1 else {}))
        self.send("Input.dispatchKeyEvent", type="keyDown", **own)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def shot(self, path, **clip):
        "A picture of the page, or of a part of it: x, y, width, height."
        part = dict(clip=dict(clip, scale=1)) if clip else {}
        data = self.send("Page.captureScreenshot", format="png", **part)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def of(self, *methods): return [e["params"] for e in self.events if e.get("method") in methods]

    @property
    def errors(self):
        "Exceptions, console errors and whatever the browser itself complains of, refused requests among it."
        logged = [p["entry"] for p in self.of("Log.entryAdded") if p["entry"]["level"] == "error"]
        said = [call for call in self.of("Runtime.consoleAPICalled") if call["type"] == "error"]
        return self.of("Runtime.exceptionThrown") + said + logged

    @property
    def requests(self): return [p["request"]["url"] for p in self.of("Network.requestWillBeSent")]
