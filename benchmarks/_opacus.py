"""Opacus on PyTorch's CPU, for comparison: per-sample hooks and ghost clipping.

Ratios are to PyTorch's own ordinary gradient. Only sums of clipped gradients are
computed, no noise is drawn and no step is taken.
"""

import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np


def models() -> dict[str, Callable[[], tuple[Any, Any, Any]]]:
    """By name of the workload: module, inputs and labels."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width: int, heads: int, length: int):
            super().__init__()
            self.heads = heads
            self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
            self.qkv = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
            self.out = nn.Linear(width, width)
            self.up, self.down = (
                nn.Linear(width, 4 * width),
                nn.Linear(4 * width, width),
            )
            self.register_buffer("mask", torch.ones(length, length).tril().bool())

        def forward(self, x: Any) -> Any:
            h = self.norms[0](x)
            split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            q, k, v = (split(layer(h)) for layer in self.qkv)
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            scores = scores.masked_fill(~self.mask, -1e30).softmax(-1)
            x = x + self.out((scores @ v).transpose(1, 2).flatten(2))
            return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))

    def transformer(width: int, length: int, size: int):
        blocks = [Block(width, width // 64, length) for _ in range(4)]
        module = nn.Sequential(
            nn.Embedding(256, width),
            *blocks,
            nn.LayerNorm(width),
            nn.Linear(width, 256),
        )
        tokens = torch.randint(256, (size, length))
        return module, tokens, torch.randint(256, (size, length))

    def mlp():
        sizes = (784, 1024, 1024, 1024, 10)
        layers: list = []
        for i, o in itertools.pairwise(sizes):
            layers += [nn.Linear(i, o), nn.ReLU()]
        module = nn.Sequential(*layers[:-1])
        return module, torch.randn(256, 784), torch.randint(10, (256,))

    def cnn():
        layers, before = [], 3
        for k, width in enumerate((32, 64, 64)):
            stride = 2 if k else 1
            layers += [nn.Conv2d(before, width, 3, stride, 1), nn.GroupNorm(8, width)]
            layers.append(nn.ReLU())
            before = width
        module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4096, 10))
        return module, torch.randn(64, 3, 32, 32), torch.randint(10, (64,))

    return {
        "mlp": mlp,
        "cnn": cnn,
        "transformer": lambda: transformer(256, 64, 16),
        "transformer T=512": lambda: transformer(512, 512, 4),
    }


def measure(name: str, turns: int) -> None:
    """Prints the times of one workload, as ratios to the ordinary gradient."""
    import torch
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleModuleFastGradientClipping as Ghost,
    )

    if name not in models():
        print(f"{'Opacus':24} no such layer")
        return

    def total(logits: Any, labels: Any) -> Any:
        flat = torch.nn.functional.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), reduction="none"
        )
        return flat.reshape(labels.shape[0], -1).sum(1)

    def ordinary() -> Callable:
        module, x, y = models()[name]()

        def run():
            module.zero_grad()
            total(module(x), y).sum().backward()

        return run

    def hooks() -> Callable:
        module, x, y = models()[name]()
        module = GradSampleModule(module, loss_reduction="sum")

        def run():
            module.zero_grad()
            total(module(x), y).sum().backward()
            grads = [p.grad_sample for p in module.parameters()]
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
            factor = (1 / norms).clamp(max=1)
            for p, g in zip(module.parameters(), grads, strict=True):
                p.grad = torch.einsum("b,b...->...", factor, g)

        return run

    def ghost() -> Callable:
        module, x, y = models()[name]()
        module = Ghost(module, max_grad_norm=1.0, loss_reduction="sum",
                       use_ghost_clipping=True)  # fmt: skip

        def run():
            module.zero_grad()
            losses = total(module(x), y)
            losses.sum().backward(retain_graph=True)
            factor = module.get_clipping_coef()
            module.zero_grad()
            module.disable_hooks()
            (factor * losses).sum().backward()
            module.enable_hooks()

        return run

    warnings.simplefilter("ignore")  # of hooks on inputs without gradients
    torch.manual_seed(0)
    runs = {"torch ordinary": ordinary(), "Opacus hooks": hooks(),
            "Opacus ghost": ghost()}  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            times[key].append(time.perf_counter() - start)
    base = np.array(times["torch ordinary"][1:])
    for key, row in times.items():
        seconds = np.array(row[1:])
        share = np.median(seconds / base)
        print(f"{key:24} {1e3 * np.median(seconds):9.1f} {share:7.2f}")
