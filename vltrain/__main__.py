"""`python -m vltrain` is `vltrain`."""

from vltrain.cli import main

if __name__ == "__main__":
    main()
