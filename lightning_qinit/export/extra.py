"""The packages of the extra ``export``."""

import importlib
from typing import Any


def require(module: str) -> Any:
    """The module of this name, or ``ModuleNotFoundError`` that says how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.split(".")[0]
        raise ModuleNotFoundError(
            f"This export needs {name}, which is not installed: `pip install 'lightning-qinit[export]'`."
        ) from error
