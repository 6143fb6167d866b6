"""Puts Markdown into a page: `COMMAND | python -m benchmarks.page PAGE BLOCK`.

The page marks its block by the lines `<!-- BLOCK -->` and `<!-- end -->`. Of the input, lines
before its first table are left out.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from models.files import written_whole


def main() -> None:
    """Replace the block."""
    path, block = Path(sys.argv[1]), sys.argv[2]
    printed = sys.stdin.read()
    table = printed[printed.find("|") :].strip()
    if not table.startswith("|"):
        sys.exit(f"{path}: {block}: the input has no table")
    marked = re.compile(rf"(<!-- {re.escape(block)} -->\n).*?(<!-- end -->)", re.DOTALL)
    text, found = marked.subn(lambda ends: f"{ends[1]}{table}\n{ends[2]}", path.read_text())
    if found != 1:
        sys.exit(f"{path}: has {found} blocks {block}; there must be one")
    with written_whole(path) as partial:
        partial.write_text(text)
        partial.chmod(0o644)


if __name__ == "__main__":
    main()
