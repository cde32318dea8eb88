"""tests/mutants.py: the list of faults fits the scripts, and a fault that no test notices is named."""

from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import Fault

FAULTS = mutants.read_faults()


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_each_fault_of_the_list_stands_once_in_its_script(fault):
    text = (mutants.ROOT / fault.script).read_text(encoding="utf-8")
    assert text.count(fault.before) == 1
    assert fault.after != fault.before


@pytest.fixture
def project(tmp_path) -> Path:
    """A script that doubles, and a test that looks at one value only."""
    (tmp_path / "double.py").write_text("def double(value):\n    return 2 * value\n")
    (tmp_path / "test_double.py").write_text(
        "from double import double\n\n\ndef test_of_two():\n    assert double(2) == 4\n"
    )
    return tmp_path


def test_a_fault_is_caught_when_a_test_fails_with_it_and_the_script_is_whole_again_afterwards(project):
    before = (project / "double.py").read_text()
    assert mutants.is_caught(Fault("double.py", "2 * value", "3 * value", "test_double.py"), project)
    assert (project / "double.py").read_text() == before


def test_a_fault_that_no_test_notices_survives(project):
    assert not mutants.is_caught(Fault("double.py", "2 * value", "value * value", "test_double.py"), project)


def test_a_fault_whose_text_or_tests_are_not_there_is_an_error(project):
    with pytest.raises(SystemExit, match="stands 0 times"):
        mutants.is_caught(Fault("double.py", "4 * value", "3 * value", "test_double.py"), project)
    with pytest.raises(SystemExit, match="no test ran"):
        mutants.is_caught(Fault("double.py", "2 * value", "3 * value", "test_nothing.py"), project)


def test_the_survivors_are_named_and_the_exit_status_tells(monkeypatch, capsys):
    monkeypatch.setattr(mutants, "copy_project", lambda directory: None)
    monkeypatch.setattr(mutants, "is_caught", lambda fault, directory: fault != FAULTS[0])
    assert mutants.main([]) == 1
    printed = capsys.readouterr()
    assert str(FAULTS[0]) in printed.out + printed.err
    assert f"{len(FAULTS) - 1} of {len(FAULTS)} faults were caught" in printed.out
    assert mutants.main([str(FAULTS[1])]) == 0
