"A training that is killed at any moment ends in the same bits, and several processes train like one."
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from threading import Event

import pytest
import torch
from torch import nn

from dual_ipo.core import noise
from dual_ipo.store import read_table
from dual_ipo.training import Ahead, train

STEPS, SAVE_EVERY = 4, 2


def network():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(.1), nn.Linear(16, 1))
    for i, p in enumerate(model.parameters()): p.data = .3*noise(p.shape, "weight", i)
    return model


def loss_fn(model, index):
    x = noise((4, 8), "x", index)
    return (model(x)[:, 0] - x.sum(1)).square().mean(), {"mean": x.mean().item()}


def work(folder, kill_at, steps, pause):
    "Train; be killed by SIGKILL just before the `kill_at`-th time the disk is touched."
    calls = itertools.count()
    def fatal(function):
        def f(*args, **kwargs):
            if next(calls) == kill_at: os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return f
    for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"): setattr(os, name, fatal(getattr(os, name)))
    def slow(model, index):
        time.sleep(pause)
        return loss_fn(model, index)
    train(network(), slow, steps, folder, 1e-2, seed=0, warmup=3, save_every=SAVE_EVERY, accumulate=2)


def serve():
    "Fork a training for each line on stdin, so that torch is imported once; print how it ended."
    for name in ("pandas", "torch._dynamo", "torch.distributed.fsdp"): import_module(name)   # imported at first use
    for line in sys.stdin:
        task = json.loads(line)
        kill_after = task.pop("kill_after")
        pid = os.fork()
        if pid == 0:
            work(**task)
            os._exit(0)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Server:
    "Trains in processes that can be killed."

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        encoding="utf-8")

    def train(self, folder, kill_at=None, kill_after=None, steps=STEPS, pause=0.):
        "Exit code of a training, killed before a touch of the disk or after some seconds."
        task = dict(folder=str(folder), kill_at=kill_at, kill_after=kill_after, steps=steps, pause=pause)
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def finish(self, folder, steps=STEPS, pause=0.):
        "The bytes of parameters and moments and the curve that a training leaves."
        assert self.train(folder, steps=steps, pause=pause) == 0
        last, = folder.glob("step_*")
        assert last.name == f"step_{steps:06d}"
        weights, moments = [(last/name).read_bytes() for name in ("parameters.safetensors", "adam.safetensors")]
        return weights, moments, read_table(folder/"history.parquet")


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.kill()
    server.process.wait()


def test_killed_before_every_touch_of_the_disk(tmp_path, server):
    whole = server.finish(tmp_path/"whole")
    for kill_at in itertools.count():
        folder = tmp_path/f"{kill_at}"
        code = server.train(folder, kill_at)
        if code == 0: break
        assert code == -signal.SIGKILL
        assert server.finish(folder) == whole, f"killed at touch {kill_at}"
        shutil.rmtree(folder)
    assert kill_at > 40  # fsyncs, renames and removals of two checkpoints


def test_killed_at_random_moments_many_times(tmp_path, server):
    began = time.monotonic()
    whole = server.finish(tmp_path/"whole", steps=60, pause=.01)
    lasts = time.monotonic() - began
    rng, codes = random.Random(0), []
    while codes.count(-signal.SIGKILL) < 2:  # again and sooner, where the machine was busy when it was timed
        shutil.rmtree(tmp_path/"killed", ignore_errors=True)
        moments = [rng.uniform(.05, .4)*lasts for _ in range(12)]
        codes = [server.train(tmp_path/"killed", kill_after=moment, steps=60, pause=.01) for moment in moments]
        lasts /= 2
    assert server.finish(tmp_path/"killed", steps=60) == whole


SCRIPT = """
import json, math, sys
from dual_ipo.training import rank_slice, ranks, train
from test_training import network, noise

def loss_fn(model, index):
    x = rank_slice(noise((8, 8), "x", index))
    bad = index == 5 and ranks().process_index == ranks().num_processes - 1  # on one rank only
    return (model(x)[:, 0] - x.sum(1)).square().mean()*(math.nan if bad else 1), {"mean": x.mean().item()}

model = network().eval()
history = train(model, loss_fn, 6, sys.argv[1] + "/run", 1e-2, seed=0, save_every=2, accumulate=2)
if ranks().is_main_process:
    result = [[p.tolist() for p in model.parameters()], history, ranks().num_processes]
    with open(sys.argv[1] + "/result.json", "w", encoding="utf-8") as file: json.dump(result, file)
ranks().wait_for_everyone()
ranks().destroy_process_group()   # one that ends while another still talks may abort it
"""


def test_two_processes_train_like_one(tmp_path):
    (tmp_path/"script.py").write_text(SCRIPT, "utf-8")
    results = []
    for n in (1, 2):
        (tmp_path/f"{n}").mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n),
                   tmp_path/"script.py", tmp_path/f"{n}"]
        here = os.environ | {"PYTHONPATH": f"{os.path.dirname(__file__)}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        process = subprocess.run(command, env=here, timeout=300, capture_output=True, encoding="utf-8")
        assert process.returncode == 0, process.stderr[-6000:]
        results.append(json.loads((tmp_path/f"{n}"/"result.json").read_text("utf-8")))
    (one, curve, _), (two, curves, n) = results
    assert n == 2
    for a, b in zip(one, two): torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-6, rtol=0)
    skipped = [False, False, True, False, False, False]
    assert [row["skipped"] for row in curve] == [row["skipped"] for row in curves] == skipped
    for row, other in zip(curve, curves):
        if not row["skipped"]: assert all(abs(row[k] - other[k]) < 1e-5 for k in ("loss", "mean", "grad_norm"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_trains_where_the_model_is(tmp_path):
    def on_gpu(model, index):
        x = noise((4, 8), "x", index).cuda()
        return (model(x)[:, 0] - x.sum(1)).square().mean(), {}
    model = network().cuda()
    train(model, on_gpu, 4, tmp_path/"gpu", 1e-2, seed=0)
    again = network().cuda()
    train(again, None, 4, tmp_path/"gpu", 1e-2, seed=0)
    assert all(a.is_cuda and torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_the_next_batch_is_made_ahead_and_an_error_comes_where_it_is_used():
    asked, second = [], Event()
    def make(index):
        asked.append(index)
        if index == 1: second.set()
        if index == 2: raise ValueError("no batch 2")
        return index
    ahead = Ahead(make, 4)
    assert ahead(0) == 0 and second.wait(10) and ahead(1) == 1
    with pytest.raises(ValueError, match="no batch 2"): ahead(2)
    assert ahead(3) == 3 and sorted(asked) == [0, 1, 2, 3]


if __name__ == "__main__": serve()
