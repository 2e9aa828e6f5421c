"""Peak memory and time of a Gauss-Newton product, beside the way that materialises gradients.

The product with the empirical Gauss-Newton matrix of n points and P parameters is computed twice,
each in a process of its own: by `hessops.GaussNewtonOperator`, and from the ``(n, P)`` matrix of
per-sample gradients made by `torch.func`. Each process reports its peak resident memory above what
it held before the product, and the time of a product once everything is warm.

    python benchmarks/gauss_newton_memory.py [--points 2000] [--width 512] [--vectors 1]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from hessops import GaussNewtonOperator

INPUTS, CLASSES = 784, 10


def problem(points: int, width: int, vectors: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(INPUTS, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, CLASSES),
    )
    size = sum(p.numel() for p in model.parameters())
    x, y = torch.randn(points, INPUTS), torch.randint(CLASSES, (points,))
    return model, x, y, torch.randn(vectors, size)


def by_operator(model: nn.Module, x: Tensor, y: Tensor, vectors: Tensor) -> Tensor:
    batches = list(zip(x.split(500), y.split(500), strict=True))
    return GaussNewtonOperator(model, nn.CrossEntropyLoss(), batches).apply(vectors)


def by_materialising(model: nn.Module, x: Tensor, y: Tensor, vectors: Tensor) -> Tensor:
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], point: Tensor, target: Tensor) -> Tensor:
        output = functional_call(model, parameters, (point.unsqueeze(0),))
        return nn.functional.cross_entropy(output, target.unsqueeze(0))

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    gradients = torch.cat([g.reshape(len(x), -1) for g in per_sample.values()], dim=1)
    return vectors @ gradients.T @ gradients / len(x)


ROUTES = {"operator": by_operator, "materialised": by_materialising}


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(route: str, points: int, width: int, vectors: int) -> dict[str, float]:
    model, x, y, stack = problem(points, width, vectors)
    model(x[:1])
    before = peak_bytes()
    started = time.perf_counter()
    result = ROUTES[route](model, x, y, stack)
    seconds = time.perf_counter() - started
    return {
        "extra_bytes": peak_bytes() - before,
        "seconds": seconds,
        "parameters": stack.shape[1],
        "checksum": result.double().norm().item(),
    }


def main() -> None:
    """Runs both routes in processes of their own and prints them side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vectors", type=int, default=1)
    parser.add_argument("--route", choices=ROUTES)
    arguments = parser.parse_args()
    if arguments.route:
        numbers = (arguments.points, arguments.width, arguments.vectors)
        print(json.dumps(measure(arguments.route, *numbers)))
        return
    results = {}
    for route in ROUTES:
        command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--route", route]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[route] = json.loads(output.splitlines()[-1])
    size = int(results["operator"]["parameters"])
    whole = 4 * arguments.points * size
    print(f"n = {arguments.points}, P = {size:,}, {arguments.vectors} vector(s), float32")
    print(f"an (n, P) matrix takes {whole / 2**20:,.0f} MiB")
    for route, result in results.items():
        print(
            f"{route:>13}: {result['extra_bytes'] / 2**20:8,.0f} MiB above the start, "
            f"{result['seconds']:6.2f} s, norm of the result {result['checksum']:.6e}"
        )
    ratio = results["operator"]["extra_bytes"] / results["materialised"]["extra_bytes"]
    print(f"memory, operator / materialised: {ratio:.3f}")


if __name__ == "__main__":
    main()
