"""Errors of rows at many steps, in float32: what they are compared with allows for its rounding."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qinit.functional.levels import is_run
from lightning_qinit.functional.nearest import nearest_level
from lightning_qinit.functional.rows import Rows, alike, at_once, squared_error, weighted

CHUNK = 2**17  # values at a time
MOST = 2.0**126  # of an inverse step, whose inverse is a normal number: 0 times infinity would be none


class Grid(NamedTuple):
    """Errors at falling steps, ``(steps, n)``: squared errors of the values, and those of outputs if they are asked."""

    step: Tensor
    square: Tensor
    error: Tensor


class Errors:
    """Errors of rows, in float32."""

    def __init__(self, rows: Rows, levels: Tensor) -> None:
        if rows.mean is None and not alike(rows.w):  # their unit does not matter, but float32 holds few
            exponent = torch.frexp(rows.w.amax(1, keepdim=True)).exponent
            rows = rows._replace(w=torch.ldexp(rows.w, -exponent))
        w = rows.w[:1, :1].float().expand_as(rows.w) if alike(rows.w) else rows.w.float()
        self.rows = Rows(rows.x.float(), w, None if rows.mean is None else rows.mean.float(), rows.output)
        self.levels, self.run = levels.float(), is_run(levels)
        self.outer = float(levels[0]), float(levels[-1])
        self.zone = float(levels[levels != 0].abs().min()) / 2
        self.energy = weighted(self.rows.x.square(), self.rows.w).double()
        # Of errors, relative: of long sums, and of levels that are as near but for rounding; and of the energy: of
        # values, in products with errors.
        fineness = float(levels.abs().max() / levels.diff().min())
        self.rounding = 2.0**-17 + fineness * 2.0**-19
        self.small = 2.0**-45 / self.rounding

    def at(self, inverse: Tensor, row: Tensor | None = None) -> Grid:
        """Errors at the steps ``1 / inverse``, ``(steps, n)``: for each row, or for each of the given ones."""
        inverse = inverse.clamp(max=MOST).float()
        step = inverse.reciprocal()
        group = max(1, at_once(CHUNK, self.rows.x) // self.rows.x.shape[1])
        parts = []
        for first in range(0, inverse.shape[1], group):
            index = slice(first, first + group)
            rows = self.rows.take(index if row is None else row[index])
            parts.append(self._at(rows, inverse[:, index, None], step[:, index, None]))
        square, error = (torch.cat(part, 1) for part in zip(*parts, strict=True)) if parts else (step, step)
        return Grid(step.double(), square.double(), error.double())

    def _at(self, rows: Rows, inverse: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        level, rest = torch.empty_like(rows.x), torch.empty_like(rows.x)
        squares, biases = [], []
        for i in range(len(step)):
            self._round(rows.x, inverse[i], level)
            torch.addcmul(rows.x, level, step[i], value=-1, out=rest)
            if rows.mean is not None:
                biases.append(rows.sums(rest).square().sum(1))
            squares.append(weighted(rest.square_(), rows.w).double())
        square = torch.stack(squares)
        return square, square + torch.stack(biases) if biases else square

    def _round(self, x: Tensor, inverse: Tensor, level: Tensor) -> Tensor:
        torch.mul(x, inverse, out=level)
        if self.run:
            return level.round_().clamp_(*self.outer)
        return level.copy_(nearest_level(level, self.levels))

    def reached(self, step: Tensor, error: Tensor) -> Tensor:
        """What the error at a step is not above; of outputs, but for levels that are equally near."""
        if self.rows.mean is not None:
            error = squared_error(self.rows, self.levels, step.float()).double()
        return error * (1 + self.rounding) + self.small * self.energy

    def dead(self, inverse: Tensor) -> Tensor:
        """The error of points nearest to level 0, which only falls as the step does: those nearer than any other is."""
        inverse = inverse[:, None].clamp(max=MOST).float()
        values = self.rows.x * inverse
        values -= torch.nn.functional.hardshrink(values, self.zone)
        return weighted(values.square_(), self.rows.w).double() / inverse[:, 0].double().square()

    def clipped(self, step: Tensor) -> Tensor:
        """The error of the points beyond the outer levels, which only grows as the step falls."""
        x, step = self.rows.x, step[:, None].float()
        over = (x - step * self.outer[1]).clamp_(min=0).maximum(step * self.outer[0] - x)
        return weighted(over.square_(), self.rows.w).double()
