"""The paper's schemes as data: one frozen `Variant` with orthogonal options, parsed from names such as "LC-2"."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

from lumirlib.models.backbone import CASCADES, RegistrationNetwork


@dataclass(frozen=True)
class Variant:
    """One network of the study. Every option is independent of the others.

    Attributes:
        name: as in the paper's Table 2, without "backbone+".
        start_channels: N, width of the encoder, the paper's 'sc'.
        head_channels: K, width of the flow estimators (27; the paper's 4ks is 108).
        cascade: "additive" or "compositional".
        levels: number of pyramid levels.
        squarings: squarings of the integration at every level.
    """

    name: str = "backbone"
    start_channels: int = 32
    head_channels: int = 27
    cascade: str = "additive"
    levels: int = 5
    squarings: int = 7


#: What each scheme changes about the backbone, in the paper's order.
SCHEMES: dict[str, dict[str, object]] = {
    "LC-1": {"start_channels": 64, "head_channels": 108, "cascade": "additive"},
    "LC-2": {"start_channels": 64, "head_channels": 108, "cascade": "compositional"},
}

OPTIONS = tuple(option.name for option in fields(Variant) if option.name != "name")


def variant_choices() -> tuple[str, ...]:
    """Names that :func:`parse_variant` knows."""
    return ("backbone", *SCHEMES)


def parse_variant(name: str, **overrides: object) -> Variant:
    """The variant that a name stands for.

    Args:
        name: "backbone" or schemes joined by "+", with or without a leading "backbone+"; case does not matter.
        overrides: options of :class:`Variant` to set besides, such as ``cascade="compositional"``.

    Returns:
        The variant.

    Raises:
        ValueError: an unknown scheme or option, with the choices listed, or two schemes that set one option
            differently.
    """
    known = {scheme.lower(): scheme for scheme in variant_choices()}
    parts = [part.strip() for part in str(name).split("+")]
    chosen: list[str] = []
    settings: dict[str, object] = {}
    for part in parts:
        scheme = known.get(part.lower())
        if scheme is None:
            raise ValueError(
                f"unknown variant {name!r}: {part!r} is not one of {', '.join(known.values())} (joined by '+')"
            )
        if scheme == "backbone" or scheme in chosen:
            continue
        for option, value in SCHEMES[scheme].items():
            if settings.get(option, value) != value:
                raise ValueError(
                    f"variant {name!r} joins schemes that contradict each other: {option} would be "
                    f"{settings[option]!r} and {value!r}"
                )
            settings[option] = value
        chosen.append(scheme)
    unknown = sorted(set(overrides) - set(OPTIONS))
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)} of variant {name!r}: choose from {', '.join(OPTIONS)}")
    if overrides.get("cascade", "additive") not in CASCADES:
        raise ValueError(f"cascade must be one of {', '.join(CASCADES)}; got {overrides['cascade']!r}")
    return replace(Variant(name="+".join(chosen) or "backbone"), **{**settings, **overrides})


def build_model(variant: str | Variant = "backbone", **overrides: object) -> RegistrationNetwork:
    """The network of a variant, with fresh random weights (seed with ``torch.manual_seed``).

    Args:
        variant: a name for :func:`parse_variant`, or a :class:`Variant`.
        overrides: options to set besides: `start_channels`, `head_channels`, `cascade`, `levels`, `squarings`.

    Returns:
        A module with ``model(fixed, moving) -> displacement``: images ``(B, 1, D, H, W)`` in [0, 1], displacement
        ``(B, 3, D, H, W)`` in voxels.
    """
    chosen = replace(variant, **overrides) if isinstance(variant, Variant) else parse_variant(variant, **overrides)
    options = asdict(chosen)
    del options["name"]
    return RegistrationNetwork(**options)
