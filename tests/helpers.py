"""Golden files, gradients and measures that several test files share."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of what runs Triton


def golden(name: str) -> tuple[dict, dict[str, Tensor]]:
    """Facts and tensors of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return {k: json.loads(v) if v[0] in "{[" else v for k, v in file.metadata().items()}, tensors


def group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def on_meta(manifest: Path) -> dict[str, Tensor]:
    """A state dict of the names and shapes of official weights, without numbers."""
    shapes = json.loads(manifest.read_text(encoding="utf-8"))
    return {
        key: torch.empty(shape, device="meta", dtype=torch.int64 if "index" in key else torch.float32)
        for key, shape in shapes.items()
    }


def weighed(y: Tensor) -> Tensor:
    """A loss that weighs each number differently."""
    return (y.double() * torch.linspace(-1, 1.5, y.numel(), dtype=torch.float64, device=y.device).view(y.shape)).sum()


def run(call: Callable[..., Tensor | tuple[Tensor, ...]], args: Sequence[Tensor]) -> list[Tensor]:
    """The results of `call`, and the gradient of each of `args` under the loss `weighed` of them all."""
    args = [t.detach().requires_grad_() for t in args]
    results = call(*args)
    results = results if isinstance(results, tuple) else (results,)
    return [*(y.detach() for y in results), *torch.autograd.grad(sum(map(weighed, results)), args)]


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest magnitude expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.numel():
        return 0.0
    assert torch.isfinite(actual).all()
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-300)).item()


def assert_within_budget(actual: Tensor, dense: Tensor, exact: Tensor, factor: float = 1.5) -> None:
    """The error of `actual` is at most `factor` times that of a plain `dense` run at the same precision."""
    budget = factor * error(dense, exact)
    assert error(actual, exact) <= budget, (error(actual, exact), budget)
