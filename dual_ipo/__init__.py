__version__ = "0.1.0"

import sys as _sys


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
