"""Quantizers and initializers as users name them, and settings in the one form that all ways to name them have."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from lightning_qinit.initializers import INITIALIZERS, Initializer
from lightning_qinit.quantizers import Quantizer

QuantizerChoice = str | type[Quantizer] | Mapping[str, Any]
InitializerChoice = str | Initializer


def quantizer_factory(choice: QuantizerChoice, argument: str = "quantizer") -> Callable[..., Quantizer]:
    """What builds a quantizer given as a name, a class, an import path, or a mapping of these and options."""
    options = dict(choice) if isinstance(choice, Mapping) else {"name": choice}
    name = options.pop("name", None)
    found = Quantizer.registry.get(name) or _import(name) if isinstance(name, str) else name
    if not (isinstance(found, type) and issubclass(found, Quantizer)):
        raise ValueError(
            f"`{argument}` must be one of {sorted(Quantizer.registry)}, a Quantizer subclass, its import path, or a "
            f"mapping with one of these as `name` and its options, got {choice!r}."
        )
    return partial(found, **options)


def initializer_function(choice: InitializerChoice, argument: str = "initializer") -> Initializer:
    """The function of an initializer given as a name, a function or an import path."""
    found = INITIALIZERS.get(choice) or _import(choice) if isinstance(choice, str) else choice
    if not callable(found):
        raise ValueError(
            f"`{argument}` must be one of {sorted(INITIALIZERS)}, a function or its import path, got {choice!r}."
        )
    return found


def with_known_initializers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings; initializers that cannot be found here are ``"optimal"``."""

    def known(choice: InitializerChoice | None) -> InitializerChoice | None:
        try:
            if choice is not None:
                initializer_function(choice)
        except (ValueError, ImportError):
            return "optimal"
        return choice

    return {name: known(value) if name.endswith("initializer") else value for name, value in settings.items()}


def plain_form(value: Any) -> Any:
    """One form for settings that mean the same: names, lists and numbers instead of objects."""
    if isinstance(value, Mapping):
        if set(value) == {"name"}:
            return plain_form(value["name"])
        return {key: plain_form(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # arrays and tensors
        return plain_form(value.tolist())
    if isinstance(value, (list, tuple, range)):
        return [plain_form(item) for item in value]
    if isinstance(value, str) and "." in value:
        found = _import(value)
        return plain_form(found) if callable(found) else value
    if isinstance(value, type) and issubclass(value, Quantizer) and Quantizer.registry.get(value.name) is value:
        return value.name
    if callable(value):
        known = {function: name for name, function in INITIALIZERS.items()}
        path = f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        return known.get(value, path)
    return value


def _import(path: str) -> Any:
    """The object at an import path, or ``None`` if there is none; what its module fails to import is raised."""
    module, _, attribute = path.rpartition(".")
    if not module:
        return None
    try:
        return getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        return None
