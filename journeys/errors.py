"""The one error that a journey table can raise."""

from __future__ import annotations


class JourneyDataError(ValueError):
    """A journey table that cannot be used. Says where and what is wrong, never the value."""

    def __init__(
        self, file: str, problem: str, *, row: int | None = None, column: str | None = None
    ) -> None:
        """`row` counts data rows from 1 (the header is none); None where no one row is at fault."""
        self.file = file
        self.row = row
        self.column = column
        self.problem = problem
        where = [file]
        if row is not None:
            where.append(f"row {row}")
        if column is not None:
            where.append(f'column "{column}"')
        super().__init__(f"{', '.join(where)}: {problem}")
