"""`python -m secateur.cli`."""

from secateur.cli.app import main

if __name__ == "__main__":
    main()
