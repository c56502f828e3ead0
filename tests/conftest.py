"One thread for each process that a test starts: the tests of two cores share them better, and results don't depend on the machine."
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
