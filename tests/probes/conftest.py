"""What several tests of probes/ share."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Threads cost more than they give at this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
