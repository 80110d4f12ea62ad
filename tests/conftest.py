"""What several test modules use."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """For small models, where two threads wait for each other longer than they work: by far, on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
