"""The README as a package index shows it, where no file stands beside it: links to files of this repository are absolute.

The address is `Repository` of `[project.urls]` in pyproject.toml. As long as there is none, pictures are left out and links are
their text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<file>(?!https?:|#|mailto:)[^)\s]+)\)")


def for_an_index(readme: str, repository: str | None, revision: str) -> str:
    """The README with absolute links; `revision`: a tag or branch of the repository."""

    def absolute(match: re.Match[str]) -> str:
        picture, text, file = match["picture"], match["text"], match["file"]
        if repository is None:
            return "" if picture else text
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/{revision}/{file})"

    return re.sub(r"\n{3,}", "\n\n", LINK.sub(absolute, readme))


class ReadmeHook(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        root = Path(self.root)
        repository = metadata.get("urls", {}).get("Repository")
        text = (root / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": for_an_index(text, repository, f"v{metadata['version']}"),
        }
