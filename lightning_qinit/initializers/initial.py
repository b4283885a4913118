"""What an initializer chose, made fit for use."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qinit.functional.fake_quantize import EXTREME
from lightning_qinit.functional.sample import Sample


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
    good = initial.step.isfinite() & (initial.step > 0) & (sample.energy > 0)
    bounded = initial.step.clamp(1 / EXTREME, EXTREME)
    if bool((good & (bounded != initial.step)).any()):
        initial = initial._replace(step=bounded).noted("beyond the steps that float32 has room for")
    if good.all():
        return initial
    step, offset = initial.step, initial.offset
    bad = int((~good).sum())
    note = f"{bad} of {len(good)} channels without data" if good.any() else "no nonzero data"
    replacement = step[good].max() if good.any() else torch.full_like(step[0], fallback)
    repaired = torch.where(good, step, replacement), None if offset is None else torch.where(good, offset, 0.0)
    return Initial(*repaired, initial.note).noted(note)
