__version__ = "0.1.0"

try: import torchvision as _  # transformers takes one that is there for one that works, and none of its models can be imported beside one that doesn't
except ModuleNotFoundError: pass
except Exception: __import__("sys").modules["torchvision"] = None  # of another build than torch: as if it were not there
