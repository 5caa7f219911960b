"""A console for tables on whatever standard output is: a terminal of any width, a file, a pipe whose reader left."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

WIDE = 10_000  # columns that no table of ours needs


class Terminal(Console):
    """A console that leaves a closed pipe to `vllm_hidrop.cli.errors`; rich's would end the process with 1."""

    def on_broken_pipe(self) -> None:
        """Re-raise the BrokenPipeError that rich is handling."""
        raise  # noqa: PLE0704 (rich calls this while it handles the BrokenPipeError)

    def show(self, table: Table) -> None:
        """Print a table without cutting off what is too wide, as rich does: a narrow terminal wraps long lines."""
        width = self.width
        self.width = max(width, self._least_width(table))
        try:
            self.print(table, crop=False)
        finally:
            self.width = width

    def _least_width(self, table: Table) -> int:
        """Set every column's least width; returns the table's."""
        options = self.options.update(width=WIDE)
        for column in table.columns:
            measured = [Measurement.get(self, options, cell) for cell in (column.header, *column.cells, column.footer)]
            widths = (cell.maximum if column.no_wrap else cell.minimum for cell in measured)
            column.min_width = max(column.min_width or 0, *widths)
        return Measurement.get(self, options, table).minimum
