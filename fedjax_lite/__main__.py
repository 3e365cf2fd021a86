"""`python -m fedjax_lite`, the same as the command `fedjax-lite`."""

from fedjax_lite.cli import main

if __name__ == "__main__":
    main()
