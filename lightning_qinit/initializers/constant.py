"""The constants of APoT's code."""

from torch import Tensor

from lightning_qinit.functional.sample import Sample


def constant(sample: Sample, levels: Tensor) -> Tensor:
    """An outermost level at 3 standard deviations for signed data and at 8 for unsigned data, whatever the data.

    The constants of the authors' CIFAR-10 code (Li et al., ICLR 2020), where weights are normalized first.
    """
    top = levels[-1].to(sample.values)
    return (3 * sample.deviation() if levels[0] < 0 else 8 + 0 * sample.deviation()) / top
