"""Hooks for MkDocs: links from pages to files of the repository, and pictures that are drawn without a CDN."""

import hashlib
import re
import shutil
from pathlib import Path

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]
BLOB = "https://github.com/axolotl-layersel/axolotl-layersel/blob/main/"
# `make docs` takes it from npm. It is not committed, being another project's.
MERMAID = ROOT / "build" / "package" / "dist" / "mermaid.min.js"
MERMAID_SHA256 = "74d7c46dabca328c2294733910a8aa1ed0c37451776e8d5295da38a2b758fb9b"
# Where the theme would load it from, and what browsers of long ago lack.
CDN = re.compile(rb'https://unpkg\.com/[^"]*')
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page, **others) -> str:
    """Return a page's text, with links to files outside of docs/ leading to the repository.

    Raises:
        PluginError: where such a file does not exist.
    """
    if page.file.src_uri == "contributing.md":
        # The repository's own page is where GitHub looks for it; its links begin at the root.
        markdown = (ROOT / "CONTRIBUTING.md").read_text()
        markdown = re.sub(r"\]\((?!https?:|#)", "](../", markdown).replace("](../docs/", "](")
    return OUTSIDE.sub(lambda match: link(page.file.src_uri, match[1], match[2] or ""), markdown)


def link(page: str, path: str, anchor: str) -> str:
    if not (ROOT / path).exists():
        raise PluginError(f"{page}: there is no {path} to link to")
    return f"]({BLOB}{path}{anchor})"


def on_page_content(html: str, page, **others) -> str:
    """Return a page's HTML, with the script that draws its pictures where it has any and the script is there."""
    if 'class="mermaid"' not in html or not MERMAID.exists():
        return html
    root = "../" * page.url.count("/")
    # The theme draws the pictures, in its own colours.
    start = "<script>mermaid.initialize({startOnLoad: false})</script>"
    return f'{html}\n<script src="{root}assets/mermaid.min.js"></script>{start}'


def on_post_build(config, **others) -> None:
    """Put the script that draws pictures into the site, and remove the theme's addresses on another host.

    Raises:
        PluginError: where the script is not the one that is expected, or the theme names no such address any more.
    """
    site = Path(config.site_dir)
    bundles = [path for path in site.glob("assets/javascripts/bundle.*.js") if CDN.search(path.read_bytes())]
    if not bundles:
        raise PluginError("the theme no longer loads scripts from the host that this hook looks for")
    for path in bundles:
        path.write_bytes(CDN.sub(b"", path.read_bytes()))
    if not MERMAID.exists():
        return  # pictures are shown as the text that they are made from
    if hashlib.sha256(MERMAID.read_bytes()).hexdigest() != MERMAID_SHA256:
        raise PluginError(f"{MERMAID} is not the release of Mermaid that is expected: remove it and run `make docs`")
    shutil.copyfile(MERMAID, site / "assets" / "mermaid.min.js")
