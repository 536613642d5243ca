"""`python -m bfpo` is `bfpo`."""

from bfpo.cli import main

if __name__ == "__main__":
    main()
