"""Errors sown into the arithmetic: each must be found by the fast tests of its file, or those tests prove nothing."""

import pytest

from tests.numeric_mutants import IN_EVERY_RUN, MUTANTS, ROOT, Mutant, MutantRunner


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    made = MutantRunner(tmp_path_factory.mktemp("mutants"))
    yield made
    made.close()


def test_every_mutant_has_its_place():
    """In every run, so that a line that moves takes its mutant along."""
    lost = [name for name, mutant in MUTANTS.items() if (ROOT / mutant.file).read_text().count(mutant.old) != 1]
    assert lost == []
    assert set(IN_EVERY_RUN) <= set(MUTANTS)


@pytest.mark.parametrize(
    "names", [pytest.param(IN_EVERY_RUN, id="in-every-run"), pytest.param(tuple(MUTANTS), id="all", marks=pytest.mark.extended)]
)
def test_the_sources_as_they_are_pass(names, runner):
    tests = tuple(dict.fromkeys(test for name in names for test in MUTANTS[name].tests))
    status, output = runner.run("unchanged", Mutant("", "", "", tests))
    assert status == 0, output[-2000:]


@pytest.mark.parametrize("name", [name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.extended) for name in MUTANTS])
def test_an_error_sown_into_the_arithmetic_is_found(name, runner):
    status, output = runner.run(name, MUTANTS[name])
    assert status != 0, f"nothing noticed that {name}"
    assert status == 1, f"the tests could not run, instead of failing: {output[-2000:]}"
