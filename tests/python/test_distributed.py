"""pyharness/distributed.py: alone, with two processes, and with a process that goes away."""

from __future__ import annotations

import time

import pytest
import torch
import torchrun_helper

from pyharness import distributed
from pyharness.errors import HarnessError


def test_alone_is_a_world_of_one():
    with distributed.session():
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        distributed.barrier()
        tensor = torch.tensor([1.0, 2.0])
        assert distributed.all_reduce_sum(tensor) is tensor and tensor.tolist() == [1.0, 2.0]
        assert distributed.all_reduce_max(tensor) is tensor and tensor.tolist() == [1.0, 2.0]
        assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
        assert distributed.device_for("cpu") == torch.device("cpu")


TWO = """
import torch
from pyharness import distributed as d
with d.session():
    d.init()  # a second time: nothing happens
    assert d.world_size() == 2 and d.is_main() == (d.rank() == 0)
    d.barrier()
    x = torch.tensor([1.0, 10.0]) * (d.rank() + 1)
    assert d.all_reduce_sum(x) is x and x.tolist() == [3.0, 30.0], x
    count = d.all_reduce_sum(torch.tensor(2**40 + d.rank()))
    assert int(count) == 2**41 + 1, count
    y = torch.tensor([2, 1 - d.rank(), d.rank()], dtype=torch.uint8)
    assert d.all_reduce_max(y) is y and y.tolist() == [2, 1, 1], y
    assert d.gather_objects("r%d" % d.rank()) == ["r0", "r1"]
    assert d.device_for("cpu").type == "cpu"
print("done", flush=True)
"""


def test_two_processes_sum_and_gather():
    for status, out, err in torchrun_helper.run(["-c", TWO], 2):
        assert (status, out.strip()) == (0, "done"), err


GONE = """
import sys, time, torch
from pyharness import distributed as d
from pyharness.errors import run_cli
def main():
    with d.session():
        d.barrier()
        if d.rank() == 1:
            {what}
        d.barrier()
run_cli(main)
"""


def test_a_process_that_goes_ends_the_others_with_a_message():
    begin = time.monotonic()
    first, second = torchrun_helper.run(["-c", GONE.format(what="raise d.HarnessError('the disk is full')")], 2)
    assert time.monotonic() - begin < 60
    assert second[0] == 2 and "error: the disk is full" in second[2]
    assert first[0] == 2 and "another process failed, was killed" in first[2] and "Traceback" not in first[2], first[2]


def test_a_process_that_hangs_is_not_waited_for_without_end():
    first, second = torchrun_helper.run(["-c", GONE.format(what="time.sleep(5)")], 2, SWIN_DIST_TIMEOUT="2")
    assert first[0] == 2 and "or did not answer within 2 s" in first[2] and "Traceback" not in first[2], first[2]
    assert second[0] != 0


def test_an_error_of_ones_own_is_not_blamed_on_others():
    with pytest.raises(RuntimeError, match="shape"), distributed.session():
        raise RuntimeError("gloo knows no shape")  # alone: whatever the text says, there is nobody else


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE must be a number"),
        ({"RANK": "1", "WORLD_SIZE": "2", "SWIN_DIST_TIMEOUT": "0"}, "SWIN_DIST_TIMEOUT must be"),
        ({"RANK": "1", "WORLD_SIZE": "2", "SWIN_DIST_TIMEOUT": "1"}, "cannot join the others at 127.0.0.1"),
    ],
)
def test_wrong_environment_is_explained(monkeypatch, variables, message):
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(torchrun_helper.free_port()), **variables}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HarnessError, match=message):
        distributed.init()


def test_no_gpu_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HarnessError, match="finds no GPU"):
        distributed.device_for("cuda")
