"""What the user asks for, layer by layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from lightning_qinit.checks import check, check_bits, check_flag, shorten
from lightning_qinit.choices import (
    InitializerChoice,
    QuantizerChoice,
    initializer_function,
    plain_form,
    quantizer_factory,
    with_known_initializers,
)
from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers import INITIALIZERS, Initializer, initialize
from lightning_qinit.quantizers import Quantizer

Role = Literal["weight", "activation"]
ROLES: tuple[Role, ...] = ("weight", "activation")
PLURAL = {"weight": "weights", "activation": "inputs"}


@dataclass(frozen=True)
class LayerConfig:
    """The settings of one layer. Also the defaults that ``overrides`` start from.

    Attributes:
        weight_bits: 1 to 8, or ``None`` to leave the weight in float.
        activation_bits: 1 to 8, or ``None`` to leave the input in float.
        quantizer: a name, a ``Quantizer`` subclass, its import path, or a mapping of one of these as ``name`` and of
            the quantizer's own options, such as ``{"name": "lsq", "narrow_range": True}``.
        initializer: a name, a function ``(sample, levels) -> step``, or its import path.
        weight_quantizer: instead of ``quantizer`` for weights.
        activation_quantizer: instead of ``quantizer`` for inputs.
        weight_initializer: instead of ``initializer`` for weights.
        activation_initializer: instead of ``initializer`` for inputs.
        per_channel: one weight step per output channel, or one per layer.
        first_last_bits: bits instead of both of the above if this is the first or the last layer to run; ``None``
            for no exception.
        own_bits: roles whose bits ``overrides`` set, so that neither ``first_last_bits`` nor ``average_bits`` change
            them.
    """

    weight_bits: int | None = 4
    activation_bits: int | None = 4
    quantizer: QuantizerChoice = "lsq"
    initializer: InitializerChoice = "optimal"
    weight_quantizer: QuantizerChoice | None = None
    activation_quantizer: QuantizerChoice | None = None
    weight_initializer: InitializerChoice | None = None
    activation_initializer: InitializerChoice | None = None
    per_channel: bool = True
    first_last_bits: int | None = 8
    own_bits: tuple[Role, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for argument in ("weight_bits", "activation_bits", "first_last_bits"):
            check_bits(argument, getattr(self, argument))
        check_flag("per_channel", self.per_channel)
        for role in ROLES:
            self.make_quantizer(role)
            self.initializer_of(role)

    def check(self) -> None:
        """Raise ``ValueError`` if a quantizer does not take its bits, or an initializer has no answer for them."""
        for role in ROLES:
            bits: int | None = getattr(self, f"{role}_bits")
            if bits is not None:
                self._check_pair(role, bits)
                if role not in self.own_bits and self.first_last_bits not in (None, bits):
                    self._check_pair(role, self.first_last_bits, "`first_last_bits`: ")

    def check_widths(self, widths: Iterable[int]) -> None:
        """Raise ``ValueError`` if weights cannot have one of the widths that ``average_bits`` chooses from."""
        try:
            for bits in widths if self.weight_bits is not None else ():
                self._check_pair("weight", bits)
        except ValueError as error:
            raise ValueError(f"`average_bits` tries 2 to 8 bits: {error}") from error

    def make_quantizer(self, role: Role) -> Callable[..., Quantizer]:
        """What builds the quantizers of weights (``"weight"``) or inputs (``"activation"``)."""
        argument, choice = self._choice(role, "quantizer")
        return quantizer_factory(choice, argument)

    def initializer_of(self, role: Role) -> Initializer:
        """The initializer of weights or inputs."""
        argument, choice = self._choice(role, "initializer")
        return initializer_function(choice, argument)

    def _choice(self, role: Role, what: str) -> tuple[str, Any]:
        own = f"{role}_{what}"
        argument = what if getattr(self, own) is None else own
        return argument, getattr(self, argument)

    def _check_pair(self, role: Role, bits: int, source: str = "") -> None:
        """Build a quantizer and let a named initializer see its levels: what they cannot do, they say here."""
        argument, choice = self._choice(role, "quantizer")
        try:
            quantizer = self.make_quantizer(role)(bits, batch_axis=0 if role == "activation" else None)
            level_sets = [
                quantizer.level_set(bits, signed) for signed in ((True,) if role == "weight" else (True, False))
            ]
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{source}`{argument}` = {choice!r} does not take {bits} bits for {PLURAL[role]}: {error}"
            ) from error
        argument, choice = self._choice(role, "initializer")
        if not isinstance(choice, str) or choice not in INITIALIZERS:
            return  # what a user's own function does with made-up data is its own affair
        try:
            with torch.device("cpu"):  # also where modules are built on another, or without memory
                values = torch.tensor([[-1.0, 0.25, 0.5, 1.0]], dtype=torch.float64)
                for levels in level_sets:
                    data = values if levels[0] < 0 else values.abs()
                    initialize(self.initializer_of(role), Sample.of_tensor(data), levels, quantizer.has_offset)
        except ValueError as error:
            raise ValueError(
                f"{source}`{argument}` = {choice!r} does not apply to {PLURAL[role]} with {bits} bits: {error} "
                f"(`{role}_initializer` sets that of {PLURAL[role]} alone.)"
            ) from error


SETTINGS = tuple(setting.name for setting in fields(LayerConfig) if setting.name != "own_bits")


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
    # Settings by the overrides that a layer matches: to check them takes long, and many layers match the same.
    _checked: dict[tuple[str, ...], LayerConfig] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.default.check()
        self._checked[()] = self.default
        listed = not isinstance(self.skip, str) and isinstance(self.skip, Iterable)
        patterns = listed and all(isinstance(pattern, str) for pattern in self.skip)
        check("skip", self.skip, patterns, "a sequence of glob patterns")
        check(
            "overrides", self.overrides, isinstance(self.overrides, Mapping), "a mapping of glob patterns to settings"
        )
        for pattern, settings in self.overrides.items():
            if not isinstance(settings, Mapping) or not set(SETTINGS).issuperset(settings):
                raise ValueError(
                    f"`overrides[{pattern!r}]` must map some of {sorted(SETTINGS)} to values, got {settings!r}."
                )
            replace(self.default, **settings)  # each value by itself; together they are checked layer by layer

    @classmethod
    def from_plain(cls, settings: Mapping[str, Any]) -> "QuantConfig":
        """The settings that :func:`plain` wrote into a checkpoint.

        An initializer that cannot be found here (a function of another script) is of no use any more: ``"optimal"``.
        """
        of_layers = {f.name: settings[f.name] for f in fields(LayerConfig) if f.name in settings}
        of_layers = with_known_initializers(of_layers)
        overrides = {pattern: with_known_initializers(own) for pattern, own in settings["overrides"].items()}
        return cls(LayerConfig(**of_layers), skip=settings["skip"], overrides=overrides)

    def of_layer(self, name: str) -> LayerConfig | None:
        """The settings of a layer, or ``None`` if it stays in float.

        Raises:
            ValueError: if they contradict each other.
        """
        if any(fnmatchcase(name, pattern) for pattern in self.skip):
            return None
        patterns = tuple(pattern for pattern in self.overrides if fnmatchcase(name, pattern))
        if patterns not in self._checked:
            config = self.default
            for pattern in patterns:
                settings = self.overrides[pattern]
                own: set[Role] = {role for role in ROLES if f"{role}_bits" in settings}
                config = replace(config, own_bits=tuple({*config.own_bits, *own}), **settings)
            try:
                config.check()
            except ValueError as error:
                raise ValueError(f"Layer {name!r}: {error}") from error
            self._checked[patterns] = config
        config = self._checked[patterns]
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


def plain(config: QuantConfig) -> dict[str, Any]:
    """The settings as plain types, for checkpoints: classes and functions become names or import paths."""
    settings = {name: plain_form(getattr(config.default, name)) for name in SETTINGS}
    settings["skip"] = list(config.skip)
    settings["overrides"] = {pattern: plain_form(values) for pattern, values in config.overrides.items()}
    return settings


def plain_layer(config: LayerConfig) -> dict[str, Any]:
    """What a layer is quantized with, as plain types: all settings but the initializers."""
    roles = {f"{role}_quantizer": getattr(config, f"{role}_quantizer") or config.quantizer for role in ROLES}
    bits = {f"{role}_bits": getattr(config, f"{role}_bits") for role in ROLES}
    own = sorted(config.own_bits)
    rest = {"per_channel": config.per_channel, "first_last_bits": config.first_last_bits, "own_bits": own}
    return {key: plain_form(value) for key, value in {**bits, **roles, **rest}.items()}


def plain_weight(config: LayerConfig) -> dict[str, Any]:
    """What the weight of a layer is quantized with and started by, as plain types."""
    of_weight = ["weight_bits", "weight_quantizer", "per_channel"]
    if "weight" not in config.own_bits:
        of_weight.append("first_last_bits")
    settings, initializer = plain_layer(config), config.weight_initializer or config.initializer
    return {**{key: settings[key] for key in of_weight}, "weight_initializer": plain_form(initializer)}
