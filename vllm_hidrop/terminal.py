"""Tables on whatever standard output is: a terminal of any width, a file, a pipe whose reader left."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

WIDE = 10_000
"""Columns that no table of ours needs."""


class Terminal(Console):
    """A console that leaves a closed pipe to the command line, which ends without a word; rich's would end with 1."""

    def on_broken_pipe(self) -> None:
        """Let the error that is being handled go on."""
        raise  # noqa: PLE0704 (rich calls this while it handles the BrokenPipeError)

    def show(self, table: Table) -> None:
        """Print a table no narrower than its longest words and its unbroken columns: a narrow terminal wraps lines.

        rich would cut off what does not fit, numbers included.
        """
        width = self.width
        self.width = max(width, self._least_width(table))
        try:
            self.print(table, crop=False)
        finally:
            self.width = width

    def _least_width(self, table: Table) -> int:
        """Give every column its least width; returns the table's."""
        options = self.options.update(width=WIDE)
        for column in table.columns:
            measured = [Measurement.get(self, options, cell) for cell in (column.header, *column.cells, column.footer)]
            widths = (cell.maximum if column.no_wrap else cell.minimum for cell in measured)
            column.min_width = max(column.min_width or 0, *widths)
        return Measurement.get(self, options, table).minimum
