"""Files without a name that this process has mapped into its memory, as Linux tells them."""

from pathlib import Path

MAPS = Path("/proc/self/maps")


def mapped_files(folder: Path) -> list[int]:
    """The bytes of each nameless file of a folder, or of one below it, that is mapped now."""
    sizes = []
    for line in MAPS.read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        if path.startswith(f"{folder}/") and path.endswith(" (deleted)"):
            first, last = (int(address, 16) for address in addresses.split("-"))
            sizes.append(last - first)
    return sizes
