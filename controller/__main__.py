"""`python -m phalanx.controller` is the command `phalanx`."""

from .cli import main

if __name__ == "__main__":
    main()
