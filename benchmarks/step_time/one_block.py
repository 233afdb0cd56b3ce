"""What torch's compiler does to one residual block, and to five in one graph, without this package.

python -m benchmarks.step_time.one_block
"""

from __future__ import annotations

import copy
import time

import torch
from torch import nn

from examples.image_classification import CifarResNet


def milliseconds(network: nn.Module, steps: int = 20) -> float:
    """Process time of the fastest forward and backward, batch 32, 16 channels of 32 x 32."""
    x, gradient = torch.randn(2, 32, 16, 32, 32)
    found = []
    for _ in range(steps):
        start = time.process_time()
        network(x).backward(gradient)
        found.append(time.process_time() - start)
    return 1000 * min(found)


def main() -> None:
    """Prints both, eager and compiled."""
    torch.set_num_threads(1)
    blocks = CifarResNet(32).layer1
    for name, network in (("one block", blocks[0]), ("five blocks", blocks)):
        eager, compiled = copy.deepcopy(network), torch.compile(copy.deepcopy(network))
        print(f"{name}: eager {milliseconds(eager):.1f} ms", end=", ")
        print(f"compiled {milliseconds(compiled):.1f} ms")


if __name__ == "__main__":
    main()
