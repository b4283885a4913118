"""Which code runs the passes of a quantizer: kernels written for the device, or the chain of torch operations."""

import functools
import importlib
import logging
from typing import TYPE_CHECKING, Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn
from torch.jit import is_tracing as is_tracing  # type: ignore[attr-defined]  # public, but not listed

from lightning_qinit.checks import check

if TYPE_CHECKING:
    from lightning_qinit.quantizers.rounding import Gradients, Rounding
    from lightning_qinit.quantizers.scratch import Scratch

log = logging.getLogger(__name__)

Kernels = Literal["auto", "compiled", "eager"]
MODULES = {"cpu": "lightning_qinit.quantizers.cpu", "cuda": "lightning_qinit.quantizers.gpu"}
# of values and results, with their names in C++; the kernels compute in float32
DTYPES = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Half"}


class KernelModule(Protocol):
    """What a module of kernels has: the functions of :mod:`~lightning_qinit.quantizers.rounding`."""

    def rounded(self, x: Tensor, how: "Rounding", scratch: "Scratch | None") -> Tensor: ...

    def gradients(self, grad: Tensor, x: Tensor, how: "Rounding", private: bool) -> "Gradients": ...

    def rounded_with_gradients(
        self, grad: Tensor, x: Tensor, how: "Rounding", scratch: "Scratch"
    ) -> "tuple[Tensor, Gradients]": ...

    def changes(self, x: Tensor, how: "Rounding") -> tuple[Tensor, Tensor | None]: ...


def check_kernels(kernels: Kernels) -> Kernels:
    """The setting, or ``ValueError`` if it is none."""
    check("kernels", kernels, kernels in get_args(Kernels), "'auto', 'compiled' or 'eager'")
    return kernels


def is_recorded() -> bool:
    """Whether torch records operations: in ``torch.compile``, exports and ``torch.jit.trace``."""
    return torch.compiler.is_compiling() or is_tracing()


def written_for(x: Tensor, dtype: torch.dtype, kernels: Kernels) -> KernelModule | None:
    """The kernels for values and results of a dtype.

    ``None`` where the chain of operations is to run: where torch traces or differentiates the operations themselves
    (inside ``torch.compile`` and exports, which fuse them on their own, under modes, and in double backward), for other
    devices, dtypes and kinds of tensors, and where kernels cannot be compiled.

    Raises:
        RuntimeError: they cannot be, and ``kernels`` is ``"compiled"``.
    """
    if kernels == "eager" or torch.is_grad_enabled() or is_recorded():
        return None
    if torch._C._len_torch_dispatch_stack():  # a mode, such as that of `make_fx`, which may record the operations
        return None
    if type(x) not in (Tensor, nn.Parameter) or x.numel() == 0 or x.is_neg():
        return None
    if x.dtype not in DTYPES or dtype not in DTYPES or x.device.type not in MODULES:
        return None
    found = _module(x.device)
    if not isinstance(found, Exception):
        return found
    if kernels == "compiled":
        raise RuntimeError(
            f"`kernels` = 'compiled', but no kernels can be compiled here; 'auto' and 'eager' do without. ({found})"
        ) from found
    return None


@functools.cache
def _module(device: torch.device) -> KernelModule | Exception:
    """The kernels for a device, or why they cannot be had: no compiler, no Triton, a device too old."""
    try:
        module = importlib.import_module(MODULES[device.type])
        module.check(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, the chain of operations computes the same
        log.info("Quantizers do without kernels, which cannot be compiled here: %s", error)
        return error
    return cast(KernelModule, module)
