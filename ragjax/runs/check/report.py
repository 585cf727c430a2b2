"""What a check found, for people and for programs."""

from collections.abc import Callable, Sequence
from typing import Any

from ragjax.runs.check.checking import Checked

_SHOWN = 20  # problems of each kind


def describe(found: Checked) -> str:
    """Returns what was found as text of aligned columns, the problems last."""
    lines = []
    if found.data:
        lines += [f"{found.data}: {found.passages:,} passages", found.supervision]
    if found.splits:
        head = ("split", "questions", "answered", "passage known", "used", "measured by")
        lines += ["", *_table([head, *(map(_cell, split) for split in found.splits)])]
    if found.lengths:
        head = ("tokens", "median", "95 %", "longest", "limit", "cut")
        rows = [
            (
                *(f"{each.what}, {each.reader}", each.median, each.most_of, each.longest),
                *(each.limit, f"{each.share:.1%}"),
            )
            for each in found.lengths
        ]
        lines += ["", *_table([head, *(map(_cell, row) for row in rows)])]
        if sampled := [each for each in found.lengths if each.measured < each.of]:
            lines.append(f"passages: {sampled[0].measured:,} of {sampled[0].of:,}, spread over all")
    if found.languages:
        rows = [(f"language of {each.what}", each.describe()) for each in found.languages]
        lines += ["", *_table(rows)]
    lines += ["", *(f"note: {note}" for note in found.notes)] if found.notes else []
    if found.cost:
        lines.append(found.cost.describe())
    return "\n".join([*lines, *_problems(found)])


def as_json(found: Checked, *, own: Callable[[str], str] = str) -> dict[str, Any]:
    """Returns what was found as JSON values.

    Args:
        found: By a check.
        own: Makes a message one of the program that shows it.
    """
    problems, cost = found.problems, found.cost
    return {
        "code": found.code,
        "data": found.data,
        "passages": found.passages,
        "supervision": found.supervision,
        "splits": [split._asdict() for split in found.splits],
        "lengths": [each._asdict() for each in found.lengths],
        "languages": [each._asdict() for each in found.languages],
        "notes": list(map(own, found.notes)),
        "problems": {
            "count": problems.count,
            "refused": problems.refused,
            "listed": [each._asdict() | {"reason": own(each.reason)} for each in problems.listed],
        },
        "cost": cost
        and {
            "documents": cost.documents,
            "prompts": cost.lm_forwards,
            "seconds": {stage: round(seconds, 1) for stage, seconds in cost.seconds.items()},
            "bytes_on_disk": cost.bytes_on_disk,
            "free_bytes": cost.free_bytes,
        },
    }


def _problems(found: Checked) -> list[str]:
    problems = found.problems
    kinds = (
        (True, "would stop a run", problems.refused),
        (False, "that a run goes on with", problems.count - problems.refused),
    )
    lines = []
    for refused, what, count in kinds:
        listed = [each for each in problems.listed if each.refused is refused]
        if count:
            lines += ["", f"{count:,} {'problem' if count == 1 else 'problems'} {what}:"]
            lines += [f"  {each}" for each in listed[:_SHOWN]]
            if count > _SHOWN:
                lines.append(f"  and {count - _SHOWN:,} more (--json lists up to 1,000)")
    return lines or ["", "nothing is wrong"]


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(rows: Sequence[Any]) -> list[str]:
    """Returns lines of cells under each other, numbers on the right."""
    cells = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numbers = [
        len(cells) > 1 and all(row[place][:1].isdigit() for row in cells[1:])
        for place in range(len(widths))
    ]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in cells
    ]
