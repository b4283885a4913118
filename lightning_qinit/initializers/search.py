"""Rules that try candidates."""

import torch
from torch import Tensor

from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers.minmax import minmax
from lightning_qinit.initializers.requirements import bits_of, require, require_uniform

CANDIDATES = 100
BINS = 2048
ROWS = 64  # histograms taken at a time
SMOOTHING = 1e-4  # share of probability given to empty bins, as onnxruntime's calibration does


def mse_grid(sample: Sample, levels: Tensor) -> Tensor:
    """Of 1 %, 2 %, ... 100 % of the step that clips nothing, the one of least squared error.

    As MQBench, BRECQ and the oscillations code search (with differences in the first candidate).
    """
    full = minmax(sample, levels)
    candidates = full[:, None] * torch.arange(1, CANDIDATES + 1, device=full.device) / CANDIDATES
    usable = torch.where(candidates > 0, candidates, 1.0)
    errors = torch.stack([sample.error(levels, step) for step in usable.unbind(1)], dim=1)
    best = (errors <= errors.amin(1, keepdim=True)).int()
    last = candidates.shape[1] - 1 - best.flip(1).argmax(1, keepdim=True)  # of equals, the larger step
    return candidates.gather(1, last)[:, 0]


def kl(sample: Sample, levels: Tensor) -> Tensor:
    """The clip whose quantized histogram diverges least from the clipped one (TensorRT's entropy calibration).

    A histogram of magnitudes in 2048 bins is cut at every multiple of a bin from the number of levels on; what lies
    beyond joins the last bin (P). The same without it is merged into as many bins as there are magnitudes and spread
    over the nonempty ones (Q). The cut of least ``KL(P, Q)`` is the clip. Made for 8 bits, and slow per channel
    (every cut of every channel: minutes for a large network).
    """
    require_uniform("kl", levels)
    require(bits_of(levels) >= 4, "kl", "at least 4 bits: below, the least divergence is at hardly any range", levels)
    reach = torch.maximum(sample.maximum, -sample.minimum)
    width = torch.where(reach > 0, reach, 1.0) / BINS
    index = (sample.values.abs() / width[:, None]).long().clamp(max=BINS - 1)
    histogram = torch.zeros(len(reach), BINS, dtype=torch.float64, device=index.device)
    histogram.scatter_add_(1, index, sample.weights.to(histogram).expand_as(index))
    magnitudes = int(levels[-1]) + 1
    cut = torch.cat([_least_divergence(part, magnitudes) for part in histogram.split(ROWS)])
    return (cut + 0.5) * width / levels[-1].to(width)


def _least_divergence(histogram: Tensor, magnitudes: int) -> Tensor:
    """The number of bins kept, ``(rows,)``, for histograms ``(rows, bins)``."""
    rows, bins = histogram.shape
    total = histogram.sum(1)
    best = torch.full_like(total, torch.inf)
    cut = torch.full_like(total, bins)
    for kept in range(magnitudes, bins + 1):
        inside = histogram[:, :kept]
        p = inside.clone()
        p[:, -1] += total - inside.sum(1)
        merged = (torch.arange(kept, device=histogram.device) // (kept // magnitudes)).clamp(max=magnitudes - 1)
        merged = merged.expand(rows, -1)
        zeros = histogram.new_zeros(rows, magnitudes)
        filled = (inside > 0).to(histogram)
        q = zeros.scatter_add(1, merged, inside) / zeros.scatter_add(1, merged, filled).clamp(min=1)
        q = q.gather(1, merged) * filled
        divergence = _divergence(p, q)
        better = divergence < best
        best, cut = torch.where(better, divergence, best), torch.where(better, float(kept), cut)
    return cut


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    p, q = (_smoothed(h / h.sum(1, keepdim=True).clamp(min=1e-300)) for h in (p, q))
    return (p * (p / q).log()).sum(1)


def _smoothed(h: Tensor) -> Tensor:
    empty = (h == 0).sum(1, keepdim=True)
    taken = SMOOTHING * empty / (h.shape[1] - empty).clamp(min=1)
    return torch.where(h > 0, (h - taken).clamp(min=1e-12), SMOOTHING)
