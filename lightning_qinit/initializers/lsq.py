"""LSQ's statistic."""

from torch import Tensor

from lightning_qinit.functional.sample import Sample


def lsq(sample: Sample, levels: Tensor) -> Tensor:
    """``2 mean|x| / sqrt(Qp)``, with ``Qp`` the greatest level (Esser et al., ICLR 2020, section 2.1)."""
    return 2 * sample.mean(sample.values.abs()) / levels.max().to(sample.values).sqrt()
