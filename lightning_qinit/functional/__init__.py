"""The stateless core: level sets, fake quantization, and the step of least error."""

from lightning_qinit.functional.affine import OptimalAffine as OptimalAffine
from lightning_qinit.functional.affine import optimal_affine as optimal_affine
from lightning_qinit.functional.fake_quantize import fake_quantize as fake_quantize
from lightning_qinit.functional.levels import apot_levels as apot_levels
from lightning_qinit.functional.levels import uniform_levels as uniform_levels
from lightning_qinit.functional.levels import uniform_range as uniform_range
from lightning_qinit.functional.optimal import OptimalScale as OptimalScale
from lightning_qinit.functional.optimal import optimal_scale as optimal_scale
from lightning_qinit.functional.output import optimal_output_scale as optimal_output_scale
