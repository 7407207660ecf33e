"""What holds for every test: no leaks from one to the next."""

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Tests often measure the original model on purpose, which is said in a warning (and one test asserts that)."""
    config.addinivalue_line("filterwarnings", "ignore:Nothing was trained or loaded, so the original model:UserWarning")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Also for what several tests share: sums depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """A seed of its own and one thread (networks here are tiny); the environment and the number of threads as they were."""
    os.environ.pop("PL_GLOBAL_SEED", None)  # what tests share may have set it
    environment, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    os.environ.clear()
    os.environ.update(environment)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        pytest.fail("the test left a process group behind")
