"""`python -m secateur.cli`."""

from secateur.cli import main

if __name__ == "__main__":
    main()
