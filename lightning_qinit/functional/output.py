"""The step of a weight whose outputs are least in error, exactly, for any level set."""

import torch
from torch import Tensor

from lightning_qinit.functional.levels import check_levels
from lightning_qinit.functional.optimal import OptimalScale, solve_rows, to_rows
from lightning_qinit.functional.rows import Rows


@torch.no_grad()
def optimal_output_scale(
    x: Tensor,
    levels: Tensor,
    correlation: float | Tensor,
    channel_axis: int | None = None,
    outputs: Tensor | None = None,
) -> OptimalScale:
    """The step of a weight at which the mean square error of a layer's outputs is least.

    An output is a sum ``sum_i x_i a_i`` of weights times inputs, which errors ``e_i = x_i - s c_i(s)`` of the weights
    change by ``sum_i e_i a_i``. For inputs that are alike and independent the mean square of that is, in units of
    ``E[a^2]``,

        f(s) = (1 - rho) sum_i e_i^2 + rho sum_o (sum_{i in o} e_i)^2,    rho = E[a]^2 / E[a^2],

    ``rho`` the correlation of the inputs about zero and ``o`` the outputs that share the step. With inputs of mean
    zero (``rho = 0``) this is the squared error of the weights; inputs that are never negative let errors of one sign
    add up (``rho = 1 / pi`` after a ReLU of normal values).

    Between breakpoints ``f`` is a parabola, as in :func:`~lightning_qinit.functional.optimal_scale`, and the same sweep
    follows it with one more cumulative sum, inside a bracket that is proven to hold the optimum since ``f`` is never
    below its first term. But ``f`` jumps at breakpoints, so its greatest lower bound may be the limit at one of them,
    which no step attains. Steps nearer to a breakpoint than ``2^-22`` of themselves do not count therefore: the answer
    is the least of ``f`` over all others, and it stays on its side of the breakpoint when it is rounded to float32. (Of
    breakpoints nearer to each other than that the middle counts if rounding it to float32 leaves it as good.)

    Args:
        x: the weight; computed in float64.
        levels: the level values at step 1, as in :func:`~lightning_qinit.functional.optimal_scale`.
        correlation: ``rho``, at least 0 and below 1: one, or broadcastable to ``x``.
        channel_axis: one step per index of this axis, or ``None`` for one step in all.
        outputs: for every element the number of the output that it feeds, counted from 0 and broadcastable to ``x``;
            ``None``: all that share a step feed one.

    Returns:
        An :class:`~lightning_qinit.functional.OptimalScale` whose ``error`` is ``f``.

    Raises:
        ValueError: if ``x`` holds NaN or infinite values, ``levels`` is no level set, or ``correlation`` out of range.

    Example:
        >>> from lightning_qinit.functional import optimal_output_scale
        >>> x, levels = torch.tensor([-2.0, -1.0, 1.0, 2.0]), torch.tensor([-2.0, -1.0, 0.0, 1.0])
        >>> optimal_output_scale(x, levels, correlation=0.0).scale
        tensor(1.1429, dtype=torch.float64)
        >>> optimal_output_scale(x, levels, correlation=0.5).scale
        tensor(1.5000, dtype=torch.float64)
    """
    levels = check_levels(levels).to(x.device)
    if not x.isfinite().all():
        raise ValueError(f"`x` must be finite, got {int((~x.isfinite()).sum())} NaN or infinite values.")
    rho = torch.as_tensor(correlation, dtype=torch.float64)
    if not ((rho >= 0) & (rho < 1)).all():
        raise ValueError(f"`correlation` must be at least 0 and below 1, got {correlation!r}.")
    fit = solve_rows(output_rows(x, rho, channel_axis, outputs), levels)
    return fit if channel_axis is not None else OptimalScale(*(v if v is levels else v[0] for v in fit))


def output_rows(x: Tensor, correlation: Tensor, channel_axis: int | None, outputs: Tensor | None) -> Rows:
    """The rows whose error is that of the outputs of a weight (see :func:`optimal_output_scale`)."""
    values = to_rows(x, channel_axis)
    correlation = correlation.to(values)
    if not (correlation > 0).any():
        return Rows(values, torch.ones((), dtype=values.dtype, device=values.device).expand_as(values))
    rho = to_rows(correlation.expand_as(x), channel_axis)
    output = None if outputs is None else to_rows(outputs.to(x.device).expand_as(x), channel_axis).long()
    if output is not None and bool((output == output[:, :1]).all()):
        output = None
    return Rows(values, 1 - rho, rho.sqrt(), output)
