"""What an initializer chose, made fit for use."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qinit.functional.sample import Sample

EXTREME = 2.0**100  # float32 keeps a few octaves free on both sides, so that x / step and the bounds stay finite


class Initial(NamedTuple):
    """Where a quantizer starts.

    Attributes:
        step: float64, ``(groups,)``.
        offset: the same, for quantizers that have one.
        note: what the report should say about it: a guard that acted, a fallback that was taken.
    """

    step: Tensor
    offset: Tensor | None = None
    note: str = ""

    @classmethod
    def of(cls, chosen: "Tensor | Initial") -> "Initial":
        """What an initializer returned, which may be the step alone."""
        return chosen if isinstance(chosen, Initial) else cls(chosen)

    def noted(self, note: str) -> "Initial":
        """The same with a further note."""
        return self._replace(note="; ".join(filter(None, (self.note, note))))


def usable(chosen: Tensor | Initial, sample: Sample, fallback: float = 1.0) -> Initial:
    """Give every group a positive, finite step, whatever its data.

    A group that has no nonzero value (an all-zero channel), or for which the initializer gave a step that is zero,
    negative or not finite, takes the largest step of the other groups, and ``fallback`` if there is none; its offset
    is 0. Steps stay within ``2^-100`` and ``2^100``.
    """
    initial = Initial.of(chosen)
    step, offset = initial.step, initial.offset
    good = step.isfinite() & (step > 0) & (sample.energy > 0)
    bounded = step.clamp(1 / EXTREME, EXTREME)
    if bool((good & (bounded != step)).any()):
        initial, step = initial.noted("beyond the steps that float32 has room for"), bounded
    if good.all():
        return initial._replace(step=step)
    bad = int((~good).sum())
    note = f"{bad} of {len(good)} channels without data" if good.any() else "no nonzero data"
    replacement = step[good].max() if good.any() else torch.full_like(step[0], fallback)
    repaired = torch.where(good, step, replacement), None if offset is None else torch.where(good, offset, 0.0)
    return Initial(*repaired, initial.note).noted(note)
