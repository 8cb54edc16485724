"""`python -m vltrain`, and so `torchrun -m vltrain`."""

from vltrain.cli import main

if __name__ == "__main__":
    main()
