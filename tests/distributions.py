"""Kinds of data that a step may be chosen for, easy ones and hostile ones."""

import torch
from torch import Tensor


def _outliers(n: int) -> Tensor:
    x = torch.randn(n)
    x[: max(1, n // 1000)] *= 200
    return x


DISTRIBUTIONS = {
    "gaussian": torch.randn,
    "laplace": lambda n: torch.distributions.Laplace(0.0, 1.0).sample((n,)),
    "heavy": lambda n: torch.distributions.StudentT(1.5).sample((n,)),
    "one_sided": lambda n: torch.randn(n).relu(),
    "negative": lambda n: -torch.rand(n) - 0.1,
    "outliers": _outliers,
    "sparse": lambda n: torch.randn(n) * (torch.rand(n) < 0.02),
    "constant": lambda n: torch.full((n,), 0.3),
    "uniform": torch.rand,
    "lattice": lambda n: torch.randint(-20, 20, (n,)) / 16.0,
    "minute": lambda n: torch.randn(n) * 1e-30,
    "huge": lambda n: torch.randn(n) * 1e30,
    "zeros": torch.zeros,
}
