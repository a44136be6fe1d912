"""A hook of the site: links from a page to files of the repository outside docs/ are checked and become names.

On the repository's own pages such a link opens the file; the site does not hold it, so there only its name is shown.
"""

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)")
log = logging.getLogger("mkdocs.hooks.links_out")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replaces links that leave docs/; one to a file that is not there is a warning, and so an error."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def replaced(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return link[0]
        if not target.exists():
            log.warning("%s links to %s, which is not there", page.file.src_uri, link[2])
        name = target.relative_to(ROOT).as_posix() or "the repository"
        return f"`{name}`" if link[1].strip("`") == target.name else f"{link[1]} (`{name}`)"

    return LINK.sub(replaced, markdown)
