"""One thread for each process that a test starts: the tests of two cores share them better, and results don't depend
on the machine.

What is deprecated is an error, whoever says so: what a call of ours sets off in a library counts as ours. Below are
the warnings that libraries set off themselves."""
import os

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


def pytest_configure(config):
    for line in FILTERS: config.addinivalue_line("filterwarnings", line)
