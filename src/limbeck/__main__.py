"""`python -m limbeck` is `limbeck`; launchers of several processes start it so: `torchrun -m limbeck distill`."""

from limbeck.cli import main

if __name__ == "__main__":
    main()
