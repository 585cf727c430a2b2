"""Writes the project's public address, once it has one, wherever readers open or clone it.

    python docs/badges.py

The address is `url` in setup.cfg, such as `https://github.com/OWNER/ragjax`. Until it stands there,
the badges open Colab's list of notebooks, and the notebooks ask for the address. Badges in README
and notebooks name the notebook that they open: `[![Open NAME.ipynb in Colab](...)](...)`.
"""

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]
GITHUB, COLAB = "https://github.com/", "https://colab.research.google.com/"
BADGE = re.compile(
    rf"(\[!\[Open ([\w.-]+\.ipynb) in Colab\]\({COLAB}assets/colab-badge\.svg\)\])\([^)]*\)"
)
# In the JSON of a notebook, where a quotation mark is escaped.
CONSTANT = re.compile(r'(?<="REPOSITORY = \\")[^"\\]*')


def public_address() -> str:
    """Returns `url` of setup.cfg; "" while the project has no public home.

    Raises:
        ValueError: It is not on GitHub, where Colab opens notebooks from.
    """
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    url = settings.get("metadata", "url", fallback="").strip().rstrip("/").removesuffix(".git")
    if url and not re.fullmatch(rf"{GITHUB}[\w.-]+/[\w.-]+", url):
        raise ValueError(f"setup.cfg: url = {url}; Colab opens notebooks of {GITHUB}OWNER/NAME")
    return url


def addressed(text: str, url: str) -> str:
    """Returns the text of a page whose badges and `REPOSITORY` have the address `url`."""
    place = f"{COLAB}github/"
    if url:
        place += f"{url.removeprefix(GITHUB)}/blob/main/notebooks/"
    text = BADGE.sub(lambda badge: f"{badge[1]}({place}{badge[2] if url else ''})", text)
    return CONSTANT.sub(url, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(addressed(page.read_text("utf-8"), public_address()), "utf-8")
