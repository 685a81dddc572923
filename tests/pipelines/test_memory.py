import subprocess
import sys

import pytest
import torch

from zoo.pipelines.memory import free_bytes, is_out_of_memory, release


def test_free_memory_is_a_plausible_number_of_bytes():
    free = free_bytes(torch.device("cpu"))
    assert 2**20 < free < 2**50
    release(torch.device("cpu"))


def test_unknown_device_tells_nothing():
    assert free_bytes(torch.device("meta")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v exists on Linux")
def test_address_space_limit_counts():
    code = (
        "import resource, torch; from zoo.pipelines.memory import free_bytes;"
        "used = next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmSize'));"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1)); print(free_bytes(torch.device('cpu')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 0 < int(out) <= 2**28


def test_real_allocation_failure_is_recognised_and_other_errors_are_not():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
