"""What the sandbox keeps between runs: things built once, whole or not at all."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def built_once(directory: Path, recipe: dict, build: Callable[[Path], None]) -> Path:
    """Return `directory`, which `build` has filled for this `recipe`, now or in an earlier run.

    `build` gets an empty directory beside it, which takes the final name when it is complete. Two processes that ask
    at once build it once; another recipe builds it anew.
    """
    directory = Path(directory).expanduser().absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    stamp = directory / ".recipe.json"
    wanted = json.dumps(recipe, sort_keys=True)
    with open(directory.with_name(f".{directory.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (stamp.is_file() and stamp.read_text() == wanted):
            partial = directory.with_name(f".{directory.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            (partial / stamp.name).write_text(wanted)
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(partial, directory)
    return directory
