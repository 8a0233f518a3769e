"""`python -m ditmoe.launcher`: the same as `ditmoe`."""

from ditmoe.launcher.cli import main

if __name__ == "__main__":
    main()
