#!/usr/bin/env python3
"""Rebuild the table of models in README.md from `zoo list --markdown`.

python tools/readme_table.py            writes README.md
python tools/readme_table.py --check    exits with 1 when README.md is out of date
"""

import argparse
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- models: tools/readme_table.py -->", "<!-- end of models -->"


def rebuilt(text: str) -> str:
    """The README with a fresh table between its two markers."""
    command = [sys.executable, "-m", "zoo", "list", "--markdown"]
    table = subprocess.run(command, capture_output=True, text=True, check=True, cwd=README.parent).stdout
    before, rest = text.split(START, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{START}\n{table.strip()}\n{END}{after}"


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 when the table is stale")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    fresh = rebuilt(text)
    if check and fresh != text:
        print("README.md: the table of models is out of date; run python tools/readme_table.py", file=sys.stderr)
        return 1
    if not check:
        README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
