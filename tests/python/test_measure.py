"""measure.py: order of the rounds, the statistics against known values, and the recorded conditions."""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from pyharness import measure
from pyharness.errors import HarnessError


class FakeClock:
    """Nanoseconds that advance only when a method says so."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def work(self, milliseconds: float) -> None:
        self.now += int(milliseconds * 1e6)


def test_rounds_alternate_and_only_settled_calls_count() -> None:
    clock, calls = FakeClock(), []

    def method(name: str, milliseconds: float):
        def call() -> None:
            calls.append(name)
            # Twice as long right after another method, as with cold caches.
            clock.work(milliseconds * (1 if calls[-2:-1] == [name] else 2))

        return call

    methods = {"a": method("a", 2), "b": method("b", 3)}
    samples = measure.time_alternating(methods, 4, warmup=2, settle_ms=0, clock=clock)
    # The two warm-up rounds settle alone; each timed round settles with two calls and times the next. A round begins
    # with the method that the round before ended with.
    settled = ["a"] * 2 + ["b"] * 4 + ["a"] * 2
    assert calls == settled + (["a"] * 3 + ["b"] * 6 + ["a"] * 3) * 2
    assert samples == {"a": [2.0] * 4, "b": [3.0] * 4} and list(samples) == ["a", "b"]


def test_each_round_begins_with_the_next_method() -> None:
    calls: list[str] = []
    methods = {name: functools.partial(calls.append, name) for name in "abc"}
    samples = measure.time_alternating(methods, 7, warmup=0, settle_ms=None)
    rounds = ["".join(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert rounds == ["abc", "bca", "cab", "acb", "bac", "cba", "abc"]
    assert list(samples) == ["a", "b", "c"] and all(len(found) == 7 for found in samples.values())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10, 19])
def test_each_method_follows_each_other_one_equally_often(count: int) -> None:
    rounds = [measure.order_of_round(index, count) for index in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in rounds)
    assert [order[0] for order in rounds] == [*range(count), *range(count)]
    pairs = collections.Counter(pair for order in rounds for pair in itertools.pairwise(order))
    assert pairs == {pair: 2 for pair in itertools.permutations(range(count), 2)}


def test_warm_up_rounds_have_negative_numbers() -> None:
    assert measure.order_of_round(-1, 3) == [2, 1, 0] and measure.order_of_round(-3, 3)[0] == 0


def test_a_slow_method_settles_twice() -> None:
    clock, calls = FakeClock(), []

    def call() -> None:
        calls.append(clock.now)
        clock.work(50)

    samples = measure.time_alternating({"a": call}, 2, warmup=0, settle_ms=10, clock=clock)
    assert samples == {"a": [50.0, 50.0]} and len(calls) == 2 * (2 + 1)


def test_a_short_method_settles_for_longer() -> None:
    clock, calls = FakeClock(), []

    def call() -> None:
        calls.append(clock.now)
        clock.work(3)

    samples = measure.time_alternating({"a": call}, 2, warmup=0, settle_ms=10, clock=clock)
    assert samples == {"a": [3.0, 3.0]} and len(calls) == 2 * (4 + 1)


def test_device_is_waited_for_inside_the_timed_part() -> None:
    clock, queue = FakeClock(), []

    def synchronize() -> None:
        while queue:
            clock.work(queue.pop())

    samples = measure.time_alternating({"a": lambda: queue.append(5.0)}, 3, synchronize=synchronize, clock=clock)
    assert samples["a"] == [5.0, 5.0, 5.0]


@pytest.mark.parametrize(("methods", "runs"), [({}, 3), ({"a": lambda: None}, 0)])
def test_nothing_to_time_is_an_error(methods: dict, runs: int) -> None:
    with pytest.raises(ValueError, match="nothing to time"):
        measure.time_alternating(methods, runs)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_statistics_match_numpy(count: int, seed: int) -> None:
    samples = np.random.default_rng(seed).lognormal(size=count).tolist()
    found = measure.summarize(samples)
    assert found.runs == count
    assert found.median == pytest.approx(np.median(samples))
    assert found.p10 == pytest.approx(np.quantile(samples, 0.1))
    assert found.p90 == pytest.approx(np.quantile(samples, 0.9))
    assert found.mean == pytest.approx(np.mean(samples))


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        measure.summarize([])


def test_paired_ratio_cancels_drift() -> None:
    """The machine slows down fourfold on the way; each round's ratio stays 0.8, the ratio of medians would not."""
    slowdown = [1.0, 1.0, 2.0, 4.0]
    samples = {"ft": [10 * s for s in slowdown], "ours": [8 * s for s in slowdown]}
    samples["ours"][0] = 9.0
    ratio = measure.paired_ratio(samples, "ours", "ft")
    assert ratio.median == pytest.approx(0.8)
    assert (ratio.q25, ratio.q75) == (pytest.approx(0.8), pytest.approx(0.825))
    assert measure.paired_drop(samples, "ft", "ours").median == pytest.approx(np.median([1, 2, 4, 8]))


def test_pairs_of_unequal_length_are_an_error() -> None:
    with pytest.raises(ValueError):
        measure.paired_ratio({"a": [1.0, 2.0], "b": [1.0]}, "a", "b")


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    try:
        assert measure.set_threads(1) == torch.get_num_threads() == 1
        assert measure.set_threads(None) == 1
    finally:
        torch.set_num_threads(before)


def test_options_below_one_are_named() -> None:
    args = argparse.Namespace(runs=0, batch=None, eval_limit=3)
    measure.need_positive(args, "--batch", "--eval-limit")
    with pytest.raises(HarnessError, match="--runs must be at least 1, found 0"):
        measure.need_positive(args, "--batch", "--runs")


@pytest.mark.parametrize("seconds", [0.0, -1.5, float("nan"), float("inf")])
def test_seconds_of_no_use_are_named(seconds: float) -> None:
    args = argparse.Namespace(seconds=seconds, time_limit=None, limit=0.5)
    measure.need_above_zero(args, "--time-limit", "--limit")
    with pytest.raises(HarnessError, match=f"--seconds must be finite and above zero, found {seconds:g}"):
        measure.need_above_zero(args, "--limit", "--seconds")


def test_git_state_of_a_checkout(tmp_path, monkeypatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert measure.git_state(tmp_path) == {"commit": None, "dirty": None}
    monkeypatch.setenv("SWIN_COMMIT", "abc")
    assert measure.git_state(tmp_path) == {"commit": "abc", "dirty": None}
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    clean = measure.git_state(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "table2.json").write_text("{}")
    assert measure.git_state(tmp_path)["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert measure.git_state(tmp_path) == {"commit": clean["commit"], "dirty": True}


def test_the_repository_around_a_virtual_environment_is_not_ours(tmp_path) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for arguments in (["init"], ["commit", "--allow-empty", "-m", "the user's"]):
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)
    packages = tmp_path / ".venv" / "lib" / "python3" / "site-packages"
    packages.mkdir(parents=True)
    assert measure.git_state(packages) == {"commit": None, "dirty": None}
    (tmp_path / "link").symlink_to(tmp_path)
    assert measure.git_state(tmp_path / "link")["commit"], "the same folder by another name"


def test_command_line_names_no_folder_of_this_machine() -> None:
    words = [str(measure.ROOT / "pyharness" / "x.py"), "--out", str(measure.ROOT / "results")]
    assert measure.command_line(words) == "python pyharness/x.py --out results"


def test_environment_has_every_field_of_the_schema() -> None:
    meta = measure.environment({"backend": "cpu", "isa": "avx2"}, threads=2)
    assert {"date", "commit", "dirty", "device", "driver", "cuda", "torch", "engine", "threads", "command"} <= set(meta)
    assert meta["torch"] == torch.__version__
    assert meta["engine"] == {"backend": "cpu", "isa": "avx2"}
    assert "core" in meta["device"]


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, pyharness, pyharness.measure, pyharness.results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=measure.ROOT).returncode == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\nmodel\t\t: 3\n", "AMD EPYC (family 26 model 2)"),
        ("model name\t: A CPU: fast\n", "A CPU: fast"),
        ("CPU implementer\t: 0x41\n", None),
        (None, None),
    ],
)
def test_a_processor_is_named_with_its_generation(tmp_path, text: str | None, expected: str | None) -> None:
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    name = expected or measure.platform.processor() or measure.platform.machine()
    assert measure.cpu_name(file).rpartition(", ")[0] == name
    assert measure.cpu_name(file).rpartition(", ")[2].split()[1].startswith("core")
