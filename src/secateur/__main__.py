"""`python -m secateur`: the command line, for interpreters whose scripts are not on the path."""

from secateur.cli import main

if __name__ == "__main__":
    main()
