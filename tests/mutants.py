"""Put one fault at a time into a copy of the project, and see whether the tests notice it.

    make mutants                                    all faults of tests/mutants.toml
    make mutants MUTANTS_ARGS="run_distillation"    those of one script, or those whose fault has this text

A fault is a piece of a script that stands there once, what takes its place, and the tests that must fail then. What
survives is printed at the end, with exit status 1. New faults are added where a careless change was not noticed.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("mutants.toml")
SECONDS = 600  # after which a test that hangs counts as failed
TESTS_FAILED = 1  # pytest's exit status; others mean that no test ran


@dataclass(frozen=True)
class Fault:
    """One wrong line, and how it is found."""

    script: str
    before: str  # text that stands once in the script
    after: str  # what takes its place
    tests: str  # arguments of pytest

    def __str__(self) -> str:
        return f"{self.script}: {self.before!r} -> {self.after!r}"


def read_faults() -> list[Fault]:
    return [Fault(**entry) for entry in tomllib.loads(LIST.read_text(encoding="utf-8"))["fault"]]


def copy_project(directory: Path) -> None:
    """Copy what git knows of, and nothing that tests or demos have left."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)


def is_caught(fault: Fault, directory: Path) -> bool:
    """Whether a test fails while the fault is in the copy of the project in this directory."""
    path = directory / fault.script
    text = path.read_text(encoding="utf-8")
    if text.count(fault.before) != 1:
        sys.exit(f"{fault}: this text stands {text.count(fault.before)} times in the script, and it must stand once")
    path.write_text(text.replace(fault.before, fault.after), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(fault.tests)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(text, encoding="utf-8")
    if run.returncode not in (0, TESTS_FAILED):
        sys.exit(f"{fault}: no test ran:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode == TESTS_FAILED


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("wanted", nargs="?", default="", help="text of a fault or a script; unset = all")
    args = parser.parse_args(argv)
    faults = [fault for fault in read_faults() if args.wanted in str(fault)]
    survivors = []
    with tempfile.TemporaryDirectory(prefix="kotoba-mutants-") as directory:
        copy_project(Path(directory))
        for fault in tqdm(faults, unit="fault"):
            if not is_caught(fault, Path(directory)):
                survivors.append(fault)
                tqdm.write(f"survived: {fault} (tests: {fault.tests})")
    print(f"{len(faults) - len(survivors)} of {len(faults)} faults were caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
