"""pytest beside torchvision's Python: `python tests/with_torchvision.py FOLDER ARGUMENTS...`

A CPU build of torch cannot load torchvision's C++ operators, and without them its import fails.
Images need none of them, so those that the import asks for are declared."""
import sys

import torch

if __name__ == "__main__":
    folder, *arguments = sys.argv[1:]
    sys.path.insert(0, folder)
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"): operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401  before anything asks whether it is there

    import pytest
    sys.exit(pytest.main(arguments))
