"""Quantizers: what a layer trains with. To add one, write a subclass of ``Quantizer`` in a file of its own."""

from lightning_qinit.quantizers.base import Quantizer as Quantizer
from lightning_qinit.quantizers.lsq import LSQ as LSQ
