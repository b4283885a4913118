"""A weight that is quantized once and not in every forward pass, while it cannot change."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_qinit.quantizers.rounding import Rounding, rounded

PROBES = 16  # values of a weight that are looked at for a change


class KeptWeight:
    """The weight that a quantizer rounded last; it is used again until the weight or the step is changed.

    Where the levels change, the quantizer has it forgotten.

    A change through ``.data``, which torch does not count, is seen on the CPU by the sum of all values, and not at all
    on a GPU, where to look would be to wait: keep weights there only while none is made.
    """

    def __init__(self) -> None:
        self.on = False
        self._last: tuple[Any, ...] = ()  # the weight, its state then, and the result

    def switch(self, on: bool) -> None:
        """Forget the weight that is kept, and from here on keep the next, or do not."""
        self.on, self._last = on, ()

    def known(self, x: Tensor, how: Rounding, quantizer: nn.Module) -> Rounding:
        """How to round a weight, with the result if it is known.

        Args:
            x: the weight; values that are no parameter are not kept.
            how: the rounding.
            quantizer: whose parameters and buffers step and offset are computed from.
        """
        if not self.on or not isinstance(x, nn.Parameter) or torch.compiler.is_compiling():
            return how
        held = *quantizer._parameters.values(), *quantizer._buffers.values()
        tensors = x, *(t for t in held if t is not None and t.is_floating_point())  # of other levels it is told
        if any(tensor.is_inference() for tensor in tensors):  # which count no changes
            return how
        seen = *(t._version for t in tensors), x.data_ptr(), *map(_probe, tensors)
        state = *seen, how.dtype, how.kernels
        if not self._last or self._last[0] is not x or self._last[1] != state:
            with torch.inference_mode(False), torch.no_grad():  # it may have to be saved for a backward pass
                self._last = x, state, rounded(x, how)
        return how._replace(ready=self._last[2])

    def __getstate__(self) -> dict[str, Any]:
        return {"on": self.on, "_last": ()}


def _probe(x: Tensor) -> tuple[float, ...]:
    """The sum of a parameter on the CPU and some values, evenly spread in memory; nothing of one elsewhere."""
    if not x.is_cpu or not x.numel():
        return ()
    x = x.detach()
    total, count = float(x.sum()), min(x.numel(), PROBES)
    if (x.storage_offset() + x.numel()) * x.itemsize > x.untyped_storage().nbytes():  # expanded
        return (total,)
    return total, *x.as_strided((count,), (x.numel() // count,), x.storage_offset()).tolist()
