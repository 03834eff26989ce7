"""Records a profile of host and devices over a window of steps, for TensorBoard or Perfetto."""

import jax


class Window:
    """Records steps first to last into `folder`; `steps` None records nothing."""

    def __init__(self, folder: str, steps: tuple[int, int] | None):
        self._folder, self._steps, self._is_open = folder, steps or (0, -1), False

    def before(self, step: int, state) -> None:
        """Starts or stops recording before `step`; `state` is the result of the previous step."""
        first, last = self._steps
        if self._is_open and step > last:
            jax.block_until_ready(state)
            self.close()
        elif first <= step <= last and not self._is_open:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._is_open = True

    def close(self) -> None:
        if self._is_open:
            jax.profiler.stop_trace()
            self._is_open = False


def parse(text: str | None) -> tuple[int, int] | None:
    """Returns (first, last) for "first:last", and None for None.

    Raises:
      ValueError: the text has another form, or not 1 <= first <= last.
    """
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ValueError(f"steps to profile must be FIRST:LAST, from 1 on; got {text!r}")
    return int(first), int(last)
