"""Two written reports that several files of tests look at."""

import pytest
from report_examples import full_sweep, hostile_sweep

from tl_jax import report
from tl_jax.workdir import WorkDir


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """The sentences and the folder of a sweep with everything, of 200 test examples."""
    path = tmp_path_factory.mktemp("sample")
    return report.write(WorkDir(path), full_sweep(n=200)), path / "ablation"


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """The folder of a sweep with hostile names."""
    path = tmp_path_factory.mktemp("hostile")
    report.write(WorkDir(path), hostile_sweep())
    return path / "ablation"
