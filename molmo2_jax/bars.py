"""Progress bars. Off a terminal they are plain lines: a carriage return never passes line by line readers."""

import sys
from collections.abc import Iterable
from typing import TypeVar

import tqdm

_T = TypeVar("_T")
_SECONDS = 30.0   # between two lines off a terminal
_LINE = "{n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines(tqdm.tqdm):
    """Prints what a bar would say as a line of its own, now and then and at the end."""
    monitor_interval = 0   # no thread that would print in between

    def __init__(self, *args, **kwargs):
        self._shown, line = None, "{desc}: " + _LINE if kwargs.get("desc") else _LINE
        super().__init__(*args, **kwargs | dict(mininterval=_SECONDS, miniters=1, bar_format=line,
                                                dynamic_ncols=False))
        self.ncols = None   # whole lines, whatever COLUMNS says

    def display(self, msg=None, pos=None):
        if self.n != self._shown:   # the last line comes again when the bar is closed
            self._shown = self.n
            print(msg or str(self), file=self.fp, flush=True)

    def close(self):
        if not self.disable:
            self.display()
            self.disable = True   # tqdm's own end moves the cursor


def bar(iterable: Iterable[_T] | None = None, **options) -> tqdm.tqdm:
    """Returns a progress bar of tqdm, which takes the options; off a terminal one that prints lines."""
    is_terminal = getattr(options.get("file") or sys.stderr, "isatty", lambda: False)()
    return (tqdm.tqdm if is_terminal else _Lines)(iterable, **options)
