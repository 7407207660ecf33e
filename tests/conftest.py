"""What holds for every test: no leaks from one to the next."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Also for what several tests share: sums depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """One thread for each test (networks here are tiny), and the environment, the number of threads and the random state as they were."""
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
