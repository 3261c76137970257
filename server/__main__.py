"""`python -m thinkserve.server` is the `thinkserve` command."""

from thinkserve.server.cli import main

if __name__ == "__main__":
    main()
