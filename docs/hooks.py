"""What the site needs besides the pages in docs/: pages and notebooks that live elsewhere, and links to files.

mkdocs calls `on_files` once and `on_page_markdown` for every page. A page of `PAGES_ELSEWHERE` gets its place in the
site; a link from a page to one of them is turned to that place, and a link to any other file of the repository is
shown as its path, because the site does not have it.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# in the repository -> in the site
PAGES_ELSEWHERE = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "benchmarks/README.md": "project/benchmarks.md",
    "examples/notebooks/README.md": "start/notebooks.md",
    "examples/notebooks/distill_your_own_model.ipynb": "start/distill_your_own_model.md",
    "examples/notebooks/compare_mixers.ipynb": "start/compare_mixers.md",
    "examples/notebooks/write_a_mixer.ipynb": "start/write_a_mixer.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.S | re.M)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that live outside docs/."""
    for source, place in PAGES_ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        content = notebook_to_markdown(json.loads(text)) if source.endswith(".ipynb") else text
        files.append(File.generated(config, place, content=content))
    return files


def notebook_to_markdown(notebook: dict[str, Any]) -> str:
    """Write a notebook as Markdown: its text, its code, and the tables, text and pictures that the code left."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = "".join(data["image/png"]).replace("\n", "")
                parts.append(f'<img alt="what the code above draws" src="data:image/png;base64,{picture}">')
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(text: str, page: Any, config: Any, files: Any) -> str:
    """Turn the links of a page that lead out of docs/, or come from outside of it."""
    place = page.file.src_uri
    elsewhere = {site: source for source, site in PAGES_ELSEWHERE.items()}
    folder = os.path.dirname(elsewhere.get(place, f"docs/{place}"))
    turned = [
        part if i % 2 else LINK.sub(lambda m: turn_link(m, folder, place), part)
        for i, part in enumerate(CODE.split(text))
    ]
    return "".join(turned)


def turn_link(link: re.Match, folder: str, place: str) -> str:
    """Turn one link.

    Args:
        folder: of the page, in the repository.
        place: of the page, in the site.
    """
    words, target, anchor = link[1], link[2], link[3] or ""
    if re.match(r"\w+:", target):
        return link[0]
    path = os.path.normpath(os.path.join(folder, target))
    site = PAGES_ELSEWHERE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
    if site is None:
        return f"{words} (`{path}`)" if (ROOT / path).exists() else link[0]
    return f"[{words}]({os.path.relpath(site, os.path.dirname(place))}{anchor})"
