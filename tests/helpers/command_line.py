"""Running the command line in this process.

code, out, err = run_limbeck(["students", "--json"], capsys)
"""

from collections.abc import Sequence

import pytest

from limbeck.cli import main


def run_limbeck(words: Sequence[str], capsys) -> tuple[int, str, str]:
    """Run a command; returns its exit code, standard output and standard error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["limbeck", *words])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    seen = capsys.readouterr()
    return code, seen.out, seen.err
