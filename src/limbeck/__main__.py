"""`python -m limbeck` is `limbeck`; launchers of several processes start it so: `torchrun -m limbeck distill`."""

from limbeck.stages.interrupt import end_on_signals, leave_on_signals


def main() -> None:
    """The command line, with signals heard of before the rest is imported."""
    end_on_signals()
    try:
        from limbeck.cli import main as command_line

        command_line()
    finally:
        leave_on_signals()


if __name__ == "__main__":
    main()
