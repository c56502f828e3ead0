"""One thread for each process that a test starts: the tests of two cores share them better, and results don't depend
on the machine.

What is deprecated is an error, whoever says so: what a call of ours sets off in a library counts as ours. Below are
the warnings that libraries set off themselves."""
import os
import sys

import pytest
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")

FILTERS = [
    "error::DeprecationWarning", "error::FutureWarning", "error::PendingDeprecationWarning",
    # GLM's processor, torch's compiler, and what peft asks transformers
    r"ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:transformers\.",
    r"ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    r"ignore:`is_gradient_checkpointing`:FutureWarning",
    r"ignore::DeprecationWarning:ray\.", r"ignore::FutureWarning:ray\.",
    r"ignore::DeprecationWarning:(jupyter|nbformat|nbconvert|nbclient|papermill|ipykernel|zmq|traitlets|notebook)",
]

LONG = ["cluster", "notebooks", "runs", "studies", "training", "resume", "judges", "generator"]   # the longest first
APART = ["notebooks", "runs"]   # each of their tests may go to another worker: they share little


def name_of(nodeid): return nodeid.split("::")[0].split("test_")[-1].removesuffix(".py")


class Files(LoadScopeScheduling):
    "A file, whose fixtures are shared, goes to one worker."
    def _split_scope(self, nodeid): return nodeid if name_of(nodeid) in APART else name_of(nodeid)


def pytest_xdist_make_scheduler(config, log): return Files(config, log)


def pytest_collection_modifyitems(items):
    "Long files first, so that all workers end together."
    rank = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(name_of(item.nodeid), len(LONG)))


@pytest.fixture(autouse=True)
def no_progress_file():
    "A run that a test leaves behind is not where the next one reports."
    yield
    if "dual_ipo.store" in sys.modules: sys.modules["dual_ipo.store"].set_progress_file(None)


def pytest_configure(config):
    for line in FILTERS: config.addinivalue_line("filterwarnings", line)
