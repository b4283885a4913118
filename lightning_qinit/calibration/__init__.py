"""Calibration: batches become one mergeable sketch per tensor, and sketches become steps."""

from lightning_qinit.calibration.batchnorm import trained_norms as trained_norms
from lightning_qinit.calibration.initialize import settle as settle
from lightning_qinit.calibration.mode import calibration_mode as calibration_mode
from lightning_qinit.calibration.mode import untrained as untrained
from lightning_qinit.calibration.observe import Observation as Observation
from lightning_qinit.calibration.observe import observe as observe
from lightning_qinit.calibration.passes import Passes as Passes
from lightning_qinit.calibration.restore import restored as restored
from lightning_qinit.calibration.sketch import Sketch as Sketch
from lightning_qinit.calibration.start import Start as Start
from lightning_qinit.calibration.start import warn_of as warn_of
