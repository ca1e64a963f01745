"""Every fault of the suite: the promise is kept. The fast part runs always, all of it with --slow."""

import pytest

from faults.suite import CASES, FAST, Suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
  return Suite(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
  "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES], ids=lambda c: c.name
)
def test_run_again_after_a_fault_is_the_untouched_run(suite, case, tmp_path):
  suite.observe(case, tmp_path / "run")
