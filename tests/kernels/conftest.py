import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that is read before it is written shows as NaN."""
    torch.use_deterministic_algorithms(True)  # fills torch.empty
    yield
    torch.use_deterministic_algorithms(False)
