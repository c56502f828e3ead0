"""Dual-IPO: a text-to-video generator and its VLM judge post-train each other, round after round.

`Run` and `run_round` do a whole round from a config. `Generator`, `Sampling`, `sample_candidates`, `make_pairs`, `Dpo`,
`Kto` and `dpo_loss` are the generator's side of it, `Judge`, `cold_start`, `pseudo_label` and `srpo_loss` the judge's,
`Video`, `Pair` and `read_pairs` what both see; `read_results` reads what a run has left. `help(dual_ipo.Judge)` says
more."""
__version__ = "0.1.0"

import sys as _sys
from importlib import import_module as _import_module

_HOME = dict(   # where each name is defined; opened when it is asked for, since torch takes seconds
    Video="core", Pair="core", Run="store", read_pairs="data", Judge="reward", cold_start="srpo", pseudo_label="srpo",
    srpo_loss="srpo", Dpo="losses", Kto="losses", dpo_loss="losses", Generator="generator", Sampling="generator",
    sample_candidates="candidates", make_pairs="candidates", run_round="rounds", read_results="results")
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module 'dual_ipo' has no attribute {name!r}")
    documented = _import_module("dual_ipo.documented").documented
    return documented(getattr(_import_module(f"dual_ipo.{_HOME[name]}"), name))


def __dir__(): return [*globals(), *_HOME]



class _BeforeTransformers:
    """transformers takes a torchvision that is there for one that works, and none of its models can be imported beside
    one of another build than torch: such a one is as if it were not there. Torch is not imported before that."""
    seen = False

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "transformers" or cls.seen: return
        cls.seen = True
        try: import torchvision as _
        except ModuleNotFoundError: pass
        except Exception: _sys.modules["torchvision"] = None


_sys.meta_path.insert(0, _BeforeTransformers)
