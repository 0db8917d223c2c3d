"""The `safelight` command, also as `python -m safelight`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C is quiet even while it is still being imported."""
    try:
        from safelight.cli import run
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
