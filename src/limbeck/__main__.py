"""`python -m limbeck` is `limbeck`; launchers of several processes start it so: `torchrun -m limbeck distill`."""

from limbeck.core.signals import exit_on_signals, raise_on_signals


def main() -> None:
    """The command line, with signals heard of before the rest is imported."""
    raise_on_signals()
    try:
        # only now: signals during the imports are heard already
        from limbeck.cli import main as command_line

        command_line()
    finally:
        exit_on_signals()


if __name__ == "__main__":
    main()
