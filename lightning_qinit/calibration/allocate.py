"""Bits per layer of least total error under a budget, exactly."""

from collections.abc import Sequence

import torch
from torch import Tensor

BISECTIONS = 100
SLACK = 1e-12  # relative: rounding of the bounds must not cut off the optimum


def allocate_bits(
    errors: Sequence[Sequence[float]], sizes: Sequence[int], widths: Sequence[int], average: float
) -> list[int]:
    """Choose a width for every layer so that the sum of errors is least and the average width at most ``average``.

    The multiple-choice knapsack problem. Partial choices, layer by layer, are kept while no other is both smaller and
    better, and while the Lagrangian bound on what they can still reach does not exceed a solution at hand (Kellerer,
    Pferschy and Pisinger, *Knapsack Problems*, 2004, chapter 11), so that the answer is exact.

    Args:
        errors: per layer, the error at each width.
        sizes: per layer, the number of elements.
        widths: bits to choose from, increasing.
        average: the most bits per element.

    Returns:
        The width of each layer.

    Raises:
        ValueError: if ``average`` is below the least width.
    """
    if average < widths[0]:
        raise ValueError(f"`average_bits` must be at least {widths[0]}, got {average!r}.")
    error = torch.tensor(errors, dtype=torch.float64)
    cost = torch.tensor(sizes, dtype=torch.float64)[:, None] * torch.tensor(widths, dtype=torch.float64)
    budget = average * float(sum(sizes)) * (1 + SLACK)
    price, limit = _price(error, cost, budget)
    rest = (error + price * cost).amin(1).flip(0).cumsum(0).flip(0)  # bound on layer i and all after it
    least = cost[:, 0].flip(0).cumsum(0).flip(0)
    after = torch.cat((torch.stack((rest, least))[:, 1:], torch.zeros(2, 1, dtype=torch.float64)), dim=1)
    spent = lost = torch.zeros(1, dtype=torch.float64)
    trail: list[tuple[Tensor, Tensor]] = []
    for layer in range(len(sizes)):
        new_spent = (spent[:, None] + cost[layer]).flatten()
        new_lost = (lost[:, None] + error[layer]).flatten()
        bound = new_lost + after[0, layer] - price * (budget - new_spent)
        possible = (new_spent + after[1, layer] <= budget) & (bound <= limit * (1 + SLACK) + SLACK * error.sum())
        index = possible.nonzero()[:, 0]
        index = index[torch.argsort(new_lost[index], stable=True)]
        index = index[torch.argsort(new_spent[index], stable=True)]
        best = new_lost[index].cummin(0).values
        better = torch.cat((torch.ones(1, dtype=torch.bool), best[1:] < best[:-1]))  # of equals the smaller
        index = index[better]
        spent, lost = new_spent[index], new_lost[index]
        trail.append((index // len(widths), index % len(widths)))
    state = int(lost.argmin())
    chosen = []
    for parent, choice in reversed(trail):
        chosen.append(widths[int(choice[state])])
        state = int(parent[state])
    return chosen[::-1]


def _price(error: Tensor, cost: Tensor, budget: float) -> tuple[float, float]:
    """The multiplier of the budget at its best bound, and the error of the best choice seen that keeps the budget."""

    def choose(price: float) -> tuple[float, float]:
        index = (error + price * cost).argmin(1, keepdim=True)
        return float(cost.gather(1, index).sum()), float(error.gather(1, index).sum())

    spent, limit = choose(0.0)
    if spent <= budget:
        return 0.0, limit
    low, high = 0.0, float(error.max() / cost.min()) + 1e-300
    while choose(high)[0] > budget:
        high *= 2
    limit = float(error[:, 0].sum())
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        spent, lost = choose(middle)
        if spent > budget:
            low = middle
        else:
            high, limit = middle, min(limit, lost)
    return high, limit
