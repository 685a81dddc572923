#!/usr/bin/env python3
"""Check that TOML, YAML and JSON files parse and that no file is too large; prints one line a problem.

python tools/check_files.py [FILE ...]      all tracked files when none is named
"""

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

PARSERS = {".toml": tomllib.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".json": json.loads}
LIMIT = 1_000_000  # bytes
LARGE = {"checkpoints": 6_000_000, "tests/golden": 6_000_000}


def problems(path: Path) -> list[str]:
    """What is wrong with one file, a line each."""
    found = []
    limit = next((size for top, size in LARGE.items() if path.as_posix().startswith(top)), LIMIT)
    if path.stat().st_size > limit:
        found.append(f"{path}: {path.stat().st_size} bytes, at most {limit} are allowed here")
    if path.suffix in PARSERS:
        try:
            PARSERS[path.suffix](path.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            found.append(f"{path}: {error}")
    return found


def main() -> int:
    """Check the named files, or every tracked one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    files = parser.parse_args().files
    if not files:
        listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
        files = [Path(name) for name in listed]
    found = [line for path in files if path.is_file() for line in problems(path)]
    print("\n".join(found), file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
