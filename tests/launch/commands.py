"""How tests start commands in their own process, and leave absl's flags as they found them."""

import pytest
from absl import flags
from absl.testing import flagsaver

from launch.support import cli


@pytest.fixture(autouse=True)
def flags_as_before():
    with flagsaver.flagsaver():
        yield
    flags.FLAGS.mark_as_parsed()


def start(main, *arguments):
    """Returns the exit status of a command; cli.start exits also after success."""
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as caught:  # repeated flags would accumulate
        cli.start(main, ["command", *map(str, arguments)])
    return caught.value.code or 0
