"""What torch has recorded of a computation."""

from typing import Any

from torch import Tensor


def reached_by(loss: Tensor) -> set[int]:
    """The ids of the leaves (parameters) that a backward pass from a loss gives a gradient to."""
    leaves: set[int] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
        waiting += [following for following, _ in node.next_functions]
    return leaves
