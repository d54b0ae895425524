"""A picture of a page that momify wrote, as the README shows it: python benchmarks/screenshot.py report.html report.png

Needs the Python package playwright and a Chromium. The picture is the first screen, reduced to 128 colours (under
100 kB for a report); --width and --height are of the window, --dark for the dark page.
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright


def screenshot(page: Path, width: int, height: int, scheme: str) -> bytes:
    """The first screen of `page` as PNG, three pixels for two."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        context = browser.new_context(
            viewport={"width": width, "height": height}, device_scale_factor=1.5, color_scheme=scheme, offline=True
        )
        tab = context.new_page()
        tab.goto(page.resolve().as_uri())
        picture = tab.screenshot()
        browser.close()
    return picture


def main() -> None:
    """Parse, look, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--height", type=int, default=1020)
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    found = screenshot(given.page, given.width, given.height, "dark" if given.dark else "light")
    Image.open(io.BytesIO(found)).convert("RGB").quantize(128).save(given.picture, optimize=True)
    print(f"{given.picture}: {given.picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
