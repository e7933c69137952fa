"""`python -m fastattn`, the same as the command `fastattn`."""

from fastattn.cli import main

if __name__ == "__main__":
    main()
