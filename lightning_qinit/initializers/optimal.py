"""Least squared quantization error, guarded where it is not the best start."""

import torch
from torch import Tensor

from lightning_qinit.functional.affine import optimal_affine as _optimal_affine
from lightning_qinit.functional.levels import check_levels
from lightning_qinit.functional.nearest import assign, nearest
from lightning_qinit.functional.optimal import solve_rows
from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers.initial import Initial

ALIVE = 0.01  # the least share of nonzero values that must not round to zero
FEW = 32  # groups of fewer values than this are overfitted by a step of their own
SHAPE = 64  # quantiles that stand for the shape of the whole tensor
PRIOR = 4.0  # how many values of a group the shape counts for


def optimal(sample: Sample, levels: Tensor) -> Initial:
    """The step of least squared error, for any level set (see ``lightning_qinit.functional.optimal_scale``).

    Exact on the data of a tensor. On a sketch, exact for the values kept; the tests hold its error on the data to
    within 1e-4 of the optimum up to 5 bits and 1e-3 up to 8 bits, on every kind of data they know.

    Two guards, which the report names where they act (``optimal_scale`` has none):

    * Under extreme outliers the optimum may keep them and round everything else to zero, which trains badly (Sakr et
      al., ICML 2022, appendix G). Where fewer than 1 % of the nonzero values would survive, those are left out, as
      values to clip, and the rest is solved.
    * A channel of fewer than 32 values (a depthwise 3x3 has 9) is solved together with the shape of the whole tensor,
      its quantiles scaled to the channel's energy and counting as 4 values more, so that its step fits values like
      its own, which training will move, and not these few alone.
    """
    levels = check_levels(levels).to(sample.values.device)
    data, notes = sample, []
    if len(sample.values) > 1 and sample.values.shape[1] < FEW:
        data = _with_shape(sample)
    if data is not sample:
        notes.append("few values per channel, shaped by the whole tensor")
    step = solve_rows(data.rows, levels).scale
    if bool((levels == 0).any()):
        step, dead = _keep_alive(data, levels, step)
        if dead:
            notes.append(f"optimum would round over {100 * (1 - ALIVE):.0f} % to zero in {dead} of {len(step)} groups")
    return Initial(step, note="; ".join(notes))


def optimal_affine(sample: Sample, levels: Tensor) -> Initial:
    """Step and offset of least squared error (see ``lightning_qinit.functional.affine``), with the guard on outliers.

    Where 99 % of the data would share one code, the rest are left out, as values to clip, and what remains is solved.
    """
    levels = check_levels(levels).to(sample.values.device)
    fit, data, note = _optimal_affine(sample, levels), sample, ""
    for _ in range(len(levels)):
        codes = assign(data.values - fit.offset[:, None], fit.scale[:, None], levels)
        counts = torch.where(data.values != 0, data.weights, 0.0)  # sparse data is mostly zero, and rightly so
        shares = torch.zeros(len(codes), len(levels), dtype=torch.float64, device=codes.device)
        shares.scatter_add_(1, codes, counts)
        total = shares.sum(1, keepdim=True)
        most, code = shares.max(1, keepdim=True)
        lonely = (most > (1 - ALIVE) * total) & (most < total)
        if not lonely.any():
            break
        data = Sample.of_values(data.values, torch.where(lonely & (codes != code), 0.0, data.weights))
        fit = _optimal_affine(data, levels)
        note = f"optimum would give one code to over {100 * (1 - ALIVE):.0f} % of the data"
    return Initial(fit.scale, fit.offset, note)


def _keep_alive(sample: Sample, levels: Tensor, step: Tensor) -> tuple[Tensor, int]:
    """Solve groups again without the few values that survive, until enough of the others do."""
    rows = sample.rows
    guarded = torch.zeros_like(step, dtype=torch.bool)
    while True:
        kept, nonzero = torch.zeros_like(step), torch.zeros_like(step)
        for part in rows.chunks():
            counts = torch.where(part.x != 0, part.w, 0.0)
            nonzero += counts.sum(1)
            kept += (counts * _survives(part.x, step, levels)).sum(1)
        dead = (kept > 0) & (kept < ALIVE * nonzero)
        if not dead.any():
            return step, int(guarded.sum())
        guarded |= dead
        clipped = dead[:, None] & _survives(rows.x, step, levels)
        mean = None if rows.mean is None else torch.where(clipped, 0.0, rows.mean)
        rows = rows._replace(w=torch.where(clipped, 0.0, rows.w), mean=mean)
        step = step.clone()
        step[dead] = solve_rows(rows.take(dead.nonzero()[:, 0]), levels).scale


def _survives(x: Tensor, step: Tensor, levels: Tensor) -> Tensor:
    """Which values do not round to zero."""
    return nearest(x, step[:, None], levels) != 0


def _with_shape(sample: Sample) -> Sample:
    """Add the quantiles of the whole tensor, in units of each group's root mean square, to every group."""
    rms = sample.root_mean_square
    unit = torch.where(rms[:, None] > 0, sample.values / rms[:, None], 0.0)
    pooled = unit[(rms[:, None] > 0) & (sample.weights > 0)].sort().values
    if not len(pooled):
        return sample
    at = ((torch.arange(SHAPE, device=pooled.device).to(pooled) + 0.5) / SHAPE * len(pooled)).long()
    shape = rms[:, None] * pooled[at]
    weight = torch.full_like(shape, PRIOR / SHAPE) * (sample.count[:, None] / sample.values.shape[1])
    values, weights = torch.cat((sample.values, shape), dim=1), torch.cat((sample.weights, weight), dim=1)
    mean, output = sample.mean_inputs, sample.output
    if mean is not None:  # the shape has no part in any output
        mean = torch.cat((mean, torch.zeros_like(shape)), dim=1)
    if output is not None:
        output = torch.cat((output, torch.zeros_like(shape, dtype=torch.int64)), dim=1)
    return Sample(values, weights, sample.minimum, sample.maximum, mean, output)
