"""The label numbers that the LUMIR evaluation scores."""

from __future__ import annotations


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
