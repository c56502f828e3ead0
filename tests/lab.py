"A JupyterLab of its own on a folder, with its app on `window`, and notebooks opened in it by a browser."
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.request import urlopen

import nbformat

CONFIG = """from jupyterlab.galata import configure_jupyter_server; configure_jupyter_server(c)
c.ServerApp.port = {port}; c.ServerApp.root_dir = {root!r}; c.ServerApp.allow_root = True; c.LabApp.news_url = None
"""
TO_FRONT = ("(w => { jupyterapp.shell.activateById(w.id); w.activate(); w.content.node.focus(); })"
            "([...jupyterapp.shell.widgets('main')][0])")
CELLS_NOW = "document.querySelectorAll('.jp-CodeCell').length"


def write_notebook(path, cells):
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@contextmanager
def lab_at(root):
    "Its address."
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    (root/"config.py").write_text(CONFIG.format(port=port, root=str(root)), "utf-8")
    env = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(root/".jupyter/settings")}
    for name in ("CONFIG", "DATA", "RUNTIME"): env[f"JUPYTER_{name}_DIR"] = str(root/".jupyter"/name.lower())
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--config", root/"config.py"], cwd=root, env=env,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(900):
            try: urlopen(f"http://127.0.0.1:{port}/api"); break
            except OSError: time.sleep(.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)   # the group this test started; kernels are in it
        try: server.wait(20)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)


def open_notebook(page, url, cells):
    "Until its cells are there, its kernel is idle and the notebook has the focus."
    page.send("Page.navigate", url=url)
    page.until(f"window.jupyterapp && {CELLS_NOW} == {cells}")
    page.until("[...jupyterapp.shell.widgets('main')][0].sessionContext?.session?.kernel?.status == 'idle'")
    page.send("Page.bringToFront")
    page.evaluate(TO_FRONT)
    page.until("!!jupyterapp.shell.currentWidget")
