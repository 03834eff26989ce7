"""Progress bars. Without a terminal they are plain lines, because line readers never see carriage returns."""

import sys
from collections.abc import Iterable
from typing import TypeVar

import tqdm

_T = TypeVar("_T")
_SECONDS = 30.0   # between two lines without a terminal
_LINE = "{n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines(tqdm.tqdm):
    """Prints the text of a bar as a separate line, at intervals and at the end."""
    monitor_interval = 0   # no thread that prints in between

    def __init__(self, *args, **kwargs):
        self._shown, line = None, "{desc}: " + _LINE if kwargs.get("desc") else _LINE
        super().__init__(*args, **kwargs | dict(mininterval=_SECONDS, miniters=1, bar_format=line,
                                                dynamic_ncols=False))
        self.ncols = None   # whole lines, regardless of COLUMNS

    def display(self, msg=None, pos=None):
        if self.n != self._shown:   # closing the bar would repeat the last line
            self._shown = self.n
            print(msg or str(self), file=self.fp, flush=True)

    def close(self):
        if not self.disable:
            self.display()
            self.disable = True   # tqdm's own close moves the cursor


def bar(iterable: Iterable[_T] | None = None, **options) -> tqdm.tqdm:
    """Returns a tqdm progress bar with these options; without a terminal, one that prints lines."""
    is_terminal = getattr(options.get("file") or sys.stderr, "isatty", lambda: False)()
    return (tqdm.tqdm if is_terminal else _Lines)(iterable, **options)


def write(text: str) -> None:
    """Prints a line to standard output, above the bars of a terminal."""
    if sys.stderr.isatty():
        tqdm.tqdm.write(text)
    else:
        print(text, flush=True)
