"""The seven scripts read alike: one skeleton, the same common code to the byte, short functions, a silent import."""

import ast
import importlib
import os
import re
import runpy
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob("*.py"))
COLUMNS = 120
COMMON = [
    "common",
    "common: progress",
    "common: records",
    "common: the Hub",
    "common: repositories to push to",
    "common: cards",
    "common: card texts",
    "common: shards",
    "common: dataset repositories",
    "common: models",
    "common: saving models",
    "common: weights and decoding",
    "common: attention",
    "common: languages",
    "common: processes",
    "common: devices and trackers",
    "common: finding datasets",
    "common: reading datasets",
    "common: columns",
    "common: names and digests",
    "common: audio",
    "common: greedy decoding",
    "common: text",
]
LAST = ["files, record, card, push", "main"]
LONGEST = 60  # lines of a function
LONGEST_MAIN = 80
OF_EVERY_SCRIPT = ("main", "parse_args")
ENDING = """

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"stopped. {CONTINUE}", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an exception while Python shuts down would print a traceback
"""


# ---- what a script consists of ----


def banner(name: str) -> str:
    return f"# ---- {name} ".ljust(COLUMNS, "-")


def blocks(script: Path) -> list[tuple[str, str]]:
    """The banners of a script in their order, each with the text below it."""
    parts = re.split(r"(?m)^# ---- (.*?) -+$", script.read_text(encoding="utf-8"))
    return list(zip(parts[1::2], parts[2::2], strict=True))


def definitions(text: str) -> dict[str, str]:
    """The text of every function and class at the top level, with its decorators."""
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


# ---- slips, each as a sentence ----


def banner_slips(scripts: list[Path]) -> Iterator[str]:
    for script in scripts:
        for line in script.read_text(encoding="utf-8").splitlines():
            if line.startswith("# ----") and line != banner(line.strip("#- ")):
                yield f"{script.name} has a banner of another form: {line}"
        names = [name for name, _ in blocks(script)]
        common = [name for name in names if name.startswith("common")]
        own = names[1 + len(common) : -len(LAST)]
        if names != ["command line", *common, *own, *LAST] or not own:
            yield f"{script.name} has its banners in another order: {', '.join(names)}"
        if common != [name for name in COMMON if name in common] or "common" not in common:
            yield f"{script.name} has its common banners in another order: {', '.join(common)}"


def common_slips(scripts: list[Path]) -> Iterator[str]:
    first: dict[str, tuple[Path, str]] = {}  # the first script with a block, and the block's text
    for script in scripts:
        for name, text in blocks(script):
            if not name.startswith("common"):
                continue
            other, expected = first.setdefault(name, (script, text))
            if text != expected:
                theirs = definitions(expected)
                ours = definitions(text)
                different = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
                place = ", ".join(different) or "what stands between the functions"
                yield f"'{name}' is not the same in {other.name} and {script.name}: {place}"


def name_slips(scripts: list[Path]) -> Iterator[str]:
    first: dict[str, tuple[Path, str]] = {}
    for script in scripts:
        for name, text in definitions(script.read_text(encoding="utf-8")).items():
            other, expected = first.setdefault(name, (script, text))
            if text != expected and name not in OF_EVERY_SCRIPT:
                yield f"{name} stands in {other.name} and in {script.name} with different texts"


def length_slips(scripts: list[Path]) -> Iterator[str]:
    for script in scripts:
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name == "parse_args":
                continue
            length = node.end_lineno - node.lineno + 1
            limit = LONGEST_MAIN if node.name == "main" else LONGEST
            if length > limit:
                yield f"{script.name}: {node.name} has {length} lines, more than {limit}"


def ending_slips(scripts: list[Path]) -> Iterator[str]:
    for script in scripts:
        if not script.read_text(encoding="utf-8").endswith(ENDING):
            yield f"{script.name} does not end with the lines that start it in the other scripts"


CHECKS = [banner_slips, common_slips, name_slips, length_slips, ending_slips]


def process_state() -> dict:
    """What an import must leave as it is."""
    return {
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
        "threads": {thread.name for thread in threading.enumerate()},
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed()),
    }


@pytest.fixture
def visible(tmp_path, monkeypatch, capfd):
    """A function that imports a script and tells what could be seen of that."""
    place = tmp_path / "an empty directory"
    place.mkdir()

    def run(script: Path) -> list:
        monkeypatch.chdir(place)
        monkeypatch.setenv("HOME", str(place))
        before = process_state()
        capfd.readouterr()
        runpy.run_path(str(script), run_name="imported")
        after = process_state()
        changed = [name for name in before if before[name] != after[name]]
        return [*capfd.readouterr(), *changed, *place.rglob("*")]

    return run


NOTHING_VISIBLE = ["", ""]  # on stdout and stderr


# ---- the seven scripts ----


@pytest.mark.parametrize("check", CHECKS)
def test_the_scripts_read_alike(check):
    assert len(SCRIPTS) == 7
    slips = list(check(SCRIPTS))
    assert not slips, "\n".join(slips)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_importing_a_script_does_nothing_that_can_be_seen(script, visible):
    importlib.import_module(script.stem)  # some libraries fill a cache when they are first imported
    assert visible(script) == NOTHING_VISIBLE


def test_the_map_of_the_tests_names_every_script_and_every_file_of_tests():
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    paths = [*SCRIPTS, *ROOT.glob("*.sh"), *ROOT.glob("tests/test_*.py")]
    assert not [path.name for path in paths if f"`{path.name}`" not in text]
    named = re.findall(r"`((?:test_|benchmarks/test_)\w+\.py)`", text)
    assert not [name for name in named if not (ROOT / "tests" / name).exists()]


# ---- the checks notice slips ----


def small_script(stage: str) -> str:
    """A script that keeps the rules, of a stage with one function of its own."""
    return f'''"""{stage}."""

import sys

{banner("command line")}


def parse_args(argv=None):
    return ["{stage}"]


{banner("common")}

CONTINUE = "Run the same command again to continue."


def fail(message):
    raise SystemExit(message)


{banner("common: text")}


def normalise(text):
    return text.lower()


{banner(stage)}


def {stage}():
    return 1


{banner("files, record, card, push")}
{banner("main")}


def main(argv=None):
    print("{stage}", parse_args(argv))
    return {stage}()
{ENDING}'''


@pytest.fixture
def pair(tmp_path) -> list[Path]:
    scripts = [tmp_path / "run_first.py", tmp_path / "run_second.py"]
    scripts[0].write_text(small_script("first"))
    scripts[1].write_text(small_script("second"))
    return scripts


def change(script: Path, old: str, new: str) -> None:
    text = script.read_text()
    assert text.count(old) == 1
    script.write_text(text.replace(old, new))


def test_two_scripts_that_keep_the_rules_have_no_slips(pair, visible):
    for check in CHECKS:
        assert not list(check(pair))
    assert visible(pair[0]) == NOTHING_VISIBLE


@pytest.mark.parametrize(
    ("check", "old", "new", "named"),
    [
        (banner_slips, banner("common"), banner("second half"), "run_second.py has its banners"),
        (banner_slips, banner("common: text"), banner("common: texts"), "run_second.py has its common banners"),
        (banner_slips, banner("main"), banner("main")[:-1], "run_second.py has a banner of another form"),
        (banner_slips, banner("second") + "\n", "", "run_second.py has its banners"),
        (banner_slips, banner("files, record, card, push") + "\n", "", "run_second.py has its banners"),
        (common_slips, "text.lower()", "text.upper()", "run_first.py and run_second.py: normalise"),
        (common_slips, "raise SystemExit(message)", "raise  SystemExit(message)", "run_second.py: fail"),
        (common_slips, "again to", "to", "'common' is not the same in run_first.py and run_second.py: what stands"),
        (name_slips, "def second", "class normalise: pass\n\n\ndef second", "normalise stands in run_first.py"),
        (
            name_slips,
            "def second",
            "def first(): pass\n\n\ndef second",
            "first stands in run_first.py and in run_second",
        ),
        (length_slips, "    return 1\n", 60 * "    1\n", "run_second.py: second has 61 lines, more than 60"),
        (length_slips, "    return second()", 79 * "    1\n", "run_second.py: main has 81 lines, more than 80"),
        (ending_slips, "sys.exit(130)", "sys.exit(1)", "run_second.py does not end"),
        (ending_slips, "sys.exit(130)\n", "sys.exit(130)\n\nprint()\n", "run_second.py does not end"),
    ],
)
def test_a_slip_is_named(pair, check, old, new, named):
    change(pair[1], old, new)
    assert any(named in slip for slip in check(pair))


def test_functions_may_be_as_long_as_the_rule_says_and_parse_args_longer(pair):
    change(pair[1], "    return 1\n", 59 * "    1\n")
    change(pair[1], "    return second()", 78 * "    1\n")
    change(pair[1], "    return [", 100 * "    1\n" + "    return [")
    assert not list(length_slips(pair))


@pytest.mark.parametrize(
    "line",
    [
        "print('hello')",
        "open('left.txt', 'w').close()",
        "import os; os.environ['LEFT'] = '1'",
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    ],
)
def test_an_import_that_does_something_is_noticed(pair, visible, line):
    change(pair[0], "import sys\n", f"import sys\n{line}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LEFT", raising=False)
        assert visible(pair[0]) != NOTHING_VISIBLE
    os.environ.pop("LEFT", None)
