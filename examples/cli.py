"""The quickstart's task through LightningCLI: every setting of the callback from YAML or the command line.

python examples/cli.py fit --config examples/config.yaml
python examples/cli.py fit --config examples/config.yaml --trainer.callbacks.initializer=lsq
"""

from lightning.pytorch.cli import LightningCLI
from task import Classifier, Images

import lightning_qinit  # noqa: F401  so that `QuantInitCallback` is known by its bare name

if __name__ == "__main__":
    LightningCLI(Classifier, Images, save_config_kwargs={"overwrite": True})
