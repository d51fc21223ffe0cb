"""The label numbers that the LUMIR evaluation scores, and whether a person's labels are of that protocol."""

from __future__ import annotations

from collections.abc import Collection, Mapping

#: Share of a person's label numbers that are LUMIR's where they follow its protocol. Manual BrainCOLOR labels have
#: 0.95; others that count from 1 reach 0.64 by chance, and FreeSurfer's have 0.34 (docs/reliability.md).
LEAST_SHARE = 0.8


def _ranges(*spans: int | tuple[int, int]) -> tuple[int, ...]:
    numbers: list[int] = []
    for span in spans:
        first, last = (span, span) if isinstance(span, int) else span
        numbers.extend(range(first, last + 1))
    return tuple(numbers)


#: The 133 labels of the LUMIR 2024 evaluation, background (0) included, in BrainCOLOR (Neuromorphometrics) numbering.
LUMIR_LABELS: tuple[int, ...] = _ranges(
    0,
    4,
    11,
    23,
    (30, 32),
    (35, 41),
    44,
    45,
    (47, 52),
    (55, 62),
    (71, 73),
    75,
    76,
    (100, 109),
    (112, 125),
    (128, 129),
    (132, 157),
    (160, 187),
    (190, 207),
)


def other_protocol(people: Mapping[str, Collection[int]]) -> str:
    """Who of a cohort has label numbers of another protocol than LUMIR's, and which; empty where nobody has.

    Args:
        people: Label numbers of each label volume, by its name; 0 does not count.

    Returns:
        A line for each such volume.
    """
    lines = []
    for name, found in people.items():
        numbers = sorted(set(found) - {0})
        others = [number for number in numbers if number not in LUMIR_LABELS]
        strays = max(1, (1 - LEAST_SHARE) * len(numbers))  # one is no protocol, where most are LUMIR's
        if len(others) > strays or len(others) > len(numbers) / 3 or not numbers:
            shown = ", ".join(map(str, others[:40])) + (" ..." if len(others) > 40 else "")
            lines.append(
                f"{name}: {len(others)} of {len(numbers)} label numbers are not LUMIR's{f': {shown}' * bool(shown)}"
            )
    return "\n".join(lines)
