"""The command line: `llamaweft VERB ...` or `python -m llamaweft VERB ...`."""

from llamaweft.cli.app import main

if __name__ == "__main__":
    main()
