"""Tables as Markdown that reads well as it is: columns are padded to the width of their cells."""

from collections.abc import Collection, Sequence


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str] = ()
) -> list[str]:
    """Return the lines of a table; columns named in `left` are aligned left, all others right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, cell, width in zip(columns, cells, widths, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = (
        "-" * (width + 2) if column in left else "-" * (width + 1) + ":"
        for column, width in zip(columns, widths, strict=True)
    )
    return [line(columns), f"|{'|'.join(rule)}|", *map(line, rows)]
