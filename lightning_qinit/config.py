"""What the user asks for, layer by layer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

from lightning_qinit.initializers import INITIALIZERS, Initializer
from lightning_qinit.quantizers import Quantizer


@dataclass(frozen=True)
class LayerConfig:
    """The settings of one layer. Also the defaults that ``overrides`` start from.

    Attributes:
        weight_bits: 1 to 8, or ``None`` to leave the weight in float.
        activation_bits: 1 to 8, or ``None`` to leave the input in float.
        quantizer: a name, a ``Quantizer`` subclass, or its import path.
        initializer: a name, a function ``(sample, levels) -> step``, or its import path.
        per_channel: one weight step per output channel, or one per layer.
        first_last_bits: bits instead of both of the above if this is the first or the last layer to run; ``None``
            for no exception.
    """

    weight_bits: int | None = 4
    activation_bits: int | None = 4
    quantizer: str | type[Quantizer] = "lsq"
    initializer: str | Initializer = "optimal"
    per_channel: bool = True
    first_last_bits: int | None = 8

    def __post_init__(self) -> None:
        for argument in ("weight_bits", "activation_bits", "first_last_bits"):
            check_bits(argument, getattr(self, argument))
        if not isinstance(self.per_channel, bool):
            raise ValueError(f"`per_channel` must be True or False, got {self.per_channel!r}.")
        quantizer_class(self.quantizer)
        initializer_function(self.initializer)

    @property
    def quantizer_class(self) -> type[Quantizer]:
        """The class that ``quantizer`` names."""
        return quantizer_class(self.quantizer)

    @property
    def initializer_function(self) -> Initializer:
        """The function that ``initializer`` names."""
        return initializer_function(self.initializer)


@dataclass(frozen=True)
class QuantConfig:
    """The settings of a whole module.

    Attributes:
        default: the settings of every layer that nothing else is said of.
        skip: glob patterns of layer names to leave in float.
        overrides: glob patterns of layer names to settings; where several match a layer, later ones win. Bits set
            here hold for the first and the last layer too.
    """

    default: LayerConfig = field(default_factory=LayerConfig)
    skip: Sequence[str] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.skip, str):
            raise ValueError(f"`skip` must be a sequence of glob patterns, got the string {self.skip!r}.")
        for pattern, settings in self.overrides.items():
            known = {setting.name for setting in fields(LayerConfig)}
            if not isinstance(settings, Mapping) or not known.issuperset(settings):
                raise ValueError(
                    f"`overrides[{pattern!r}]` must map some of {sorted(known)} to values, got {settings!r}."
                )
            replace(self.default, **settings)

    def of_layer(self, name: str) -> LayerConfig | None:
        """The settings of a layer, or ``None`` if it stays in float."""
        if any(fnmatchcase(name, pattern) for pattern in self.skip):
            return None
        config = self.default
        for pattern, settings in self.overrides.items():
            if fnmatchcase(name, pattern):
                own_bits = {"weight_bits", "activation_bits"} & settings.keys()
                config = replace(config, **{**({"first_last_bits": None} if own_bits else {}), **settings})
        return None if config.weight_bits is None and config.activation_bits is None else config

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise ``ValueError`` for a pattern of ``skip`` or ``overrides`` that matches none of the layer names."""
        names = list(names)
        for argument, patterns in (("skip", self.skip), ("overrides", self.overrides)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(
                        f"`{argument}` has the pattern {pattern!r}, which matches no layer that can be quantized; "
                        f"those are {shorten(names)}."
                    )


def check_bits(argument: str, bits: int | None) -> None:
    """Raise ``ValueError`` unless ``bits`` is a whole number from 1 to 8, or ``None``."""
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8):
        raise ValueError(f"`{argument}` must be a whole number from 1 to 8, or None, got {bits!r}.")


def quantizer_class(quantizer: str | type[Quantizer]) -> type[Quantizer]:
    """The class of a quantizer given as a name, a class or an import path."""
    if isinstance(quantizer, str):
        found = Quantizer.registry.get(quantizer) or _import(quantizer)
    else:
        found = quantizer
    if not (isinstance(found, type) and issubclass(found, Quantizer)):
        raise ValueError(
            f"`quantizer` must be one of {sorted(Quantizer.registry)}, a Quantizer subclass or its import path, "
            f"got {quantizer!r}."
        )
    return found


def initializer_function(initializer: str | Initializer) -> Initializer:
    """The function of an initializer given as a name, a function or an import path."""
    found = INITIALIZERS.get(initializer) or _import(initializer) if isinstance(initializer, str) else initializer
    if not callable(found):
        raise ValueError(
            f"`initializer` must be one of {sorted(INITIALIZERS)}, a function or its import path, got {initializer!r}."
        )
    return found


def _import(path: str) -> Any:
    """The object at an import path, or ``None`` if there is none."""
    module, _, attribute = path.rpartition(".")
    if not module:
        return None
    try:
        return getattr(import_module(module), attribute, None)
    except ModuleNotFoundError:
        return None


def plain(config: QuantConfig) -> dict[str, Any]:
    """The settings as plain types, for checkpoints: classes and functions become names or import paths."""
    settings: dict[str, Any] = {f.name: _plain(getattr(config.default, f.name)) for f in fields(LayerConfig)}
    settings["skip"] = list(config.skip)
    settings["overrides"] = {
        pattern: {key: _plain(value) for key, value in values.items()} for pattern, values in config.overrides.items()
    }
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, type) and issubclass(value, Quantizer) and Quantizer.registry.get(value.name) is value:
        return value.name
    if callable(value):
        function = getattr(value, "__qualname__", type(value).__qualname__)
        named = INITIALIZERS.get(function) is value
        return function if named else f"{value.__module__}.{function}"
    return value


def shorten(names: Sequence[str], most: int = 8) -> str:
    """A list of names for a message: the first few, and how many more."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest if names else "none"
