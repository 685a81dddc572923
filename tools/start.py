#!/usr/bin/env python3
"""Two commands for a fresh machine; they need only Python 3.11 or newer with pip.

    python3 tools/start.py          sets up .venv, restores the bundled photo and says where the pictures are
    python3 tools/start.py test     sets up .venv and runs the tests; further words go to pytest

Both reuse what is there: the second start installs nothing. Written for the oldest Python that may meet it, so that
it can say what is missing.
"""

import hashlib
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "Scripts" if os.name == "nt" else "bin", "python.exe" if os.name == "nt" else "python")
ROOM = {"": 2.0, "test": 3.5}  # GB; 1.4 and 2.7 were measured with the CPU build of torch, unpacking needs some more


def stop(sentence):
    """Say in one sentence what is missing, and leave with the exit code of a user error."""
    sys.exit("start: " + sentence)


def step(text):
    """Announce a step on stderr at once."""
    sys.stderr.write("start: " + text + "\n")
    sys.stderr.flush()


def run(words, sentence):
    """Run a command with its output visible; when it fails, say the sentence."""
    try:
        code = subprocess.call(words, cwd=ROOT)
    except KeyboardInterrupt:
        sys.exit(130)
    if code:
        stop(sentence)


def stamp(extra):
    """A file whose name changes with what is to be installed."""
    digest = hashlib.sha256(sys.version.encode())
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return os.path.join(VENV, "zoo-%s-%s" % (extra or "core", digest.hexdigest()[:12]))


def install(extra):
    """Create .venv and install zoo with the tested versions, unless that was done before."""
    if sys.version_info < (3, 11):
        found = "%d.%d" % sys.version_info[:2]
        stop("zoo needs Python 3.11 or newer and this is %s; run it as python3.11 tools/start.py" % found)
    done = stamp(extra)
    if os.path.exists(done):
        step("reusing .venv")
        return
    fresh = not os.path.exists(PYTHON)
    free = shutil.disk_usage(ROOT).free / 1e9
    if fresh and free < ROOM[extra]:
        needed = "a fresh installation takes about %.1f GB and %.1f GB are free" % (ROOM[extra], free)
        stop(needed + "; make room and run this again")
    if fresh:
        step("creating .venv")
        run([sys.executable, "-m", "venv", VENV], "python3 cannot create .venv; install its venv module (python3-venv)")
    step("installing zoo with the versions of constraints.txt (minutes the first time)")
    target = "-e.[%s]" % extra if extra else "-e."
    words = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "-c", "constraints.txt", target]
    run(words, "pip could not install zoo; check the network or the index that pip uses, then run this again")
    open(done, "w").close()


def show():
    """Restore the photo that ships with zoo, beside plain bicubic enlargement."""
    install("")
    out = os.path.join(ROOT, "outputs")
    photo = os.path.join(ROOT, "checkpoints", "demo", "chelsea.png")
    step("restoring the bundled photo")
    run(
        [PYTHON, "-m", "zoo", "restore", photo, os.path.join(out, "chelsea_x2.png"), "--compare", "--force"],
        "zoo restore failed; `.venv/bin/python -m zoo doctor` says what is wrong with this installation",
    )


def test(words):
    """Run the test suite on all cores."""
    install("test")
    step("running the tests")
    sys.exit(subprocess.call([PYTHON, "-m", "pytest", "-n", str(os.cpu_count() or 1)] + words, cwd=ROOT))


def main(words):
    """Pick the command."""
    if words[:1] == ["test"]:
        test(words[1:])
    elif words:
        stop("unknown word %r; use `python3 tools/start.py` or `python3 tools/start.py test`" % words[0])
    else:
        show()


if __name__ == "__main__":
    main(sys.argv[1:])
