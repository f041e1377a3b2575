"""What only a GPU can show of the engine: recordings, streams, devices, and that a forward pass neither waits nor
allocates. Every result is held to what the same model gave in its first, unrecorded call; test_engine.py proves that."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from op_targets import CUDA_PARAMS, Target
from op_walk import walk
from test_engine import MICRO_DIGITS, SMALL, SQNR_BOUND_DB, images_for, model_on, sqnr_db

from pyharness.config import ENGINE_GRAPHS, FUSED_GRAPH, GRAPHS
from pyharness.engine import SwinInt8
from pyharness.gpu import cuda_info
from pyharness.models import config_of, create_model
from pyharness.random_engine import random_engine_file

pytestmark = pytest.mark.gpu

LOGITS_BOUND_DB = 30.0
"""Micro logits of a 16-bit residual stream against the CPU's float32 one: the reference with its residual rounded so
gives 36 to 43 dB over graphs, types and seeds; a wrong operation is test_every_op_of_a_forward_pass's to find."""


@pytest.fixture(params=CUDA_PARAMS)
def place(request) -> Target:
    return Target(request.param)


@pytest.fixture
def micro(seed) -> SwinInt8:
    return SwinInt8.from_engine_file(random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed)).to("cuda")


@pytest.mark.parametrize("graph", ENGINE_GRAPHS)
def test_logits_are_close_to_the_cpus(place, graph, seed):
    file = random_engine_file(MICRO_DIGITS, graph, seed=seed)
    images = images_for(MICRO_DIGITS, 8, seed)
    wanted = SwinInt8.from_engine_file(file)(images)
    assert sqnr_db(model_on(place, file)(images.cuda()).cpu(), wanted) > LOGITS_BOUND_DB


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_op_of_swin_tiny(record_ties, graph, seed):
    """A real model at its real size: head size 32, window 7, 224 x 224."""
    name, place = "swin_tiny_patch4_window7_224", Target("cuda_fp16")
    file = random_engine_file(config_of(create_model(name), name), graph, seed=seed)
    images = images_for(file.config, 2, seed)
    model = model_on(place, file)
    assert sqnr_db(model(images.cuda()).cpu(), walk(file, images, model, place, record_ties)) > SQNR_BOUND_DB


@pytest.fixture(params=["default stream", "own stream"])
def stream(request):
    own = torch.cuda.Stream() if request.param == "own stream" else torch.cuda.current_stream()
    with torch.cuda.stream(own):
        yield own
    torch.cuda.synchronize()


@pytest.mark.parametrize("graph", ENGINE_GRAPHS)
def test_recorded_calls_equal_the_first(place, graph, stream, seed):
    """The first call of a batch size runs as it is, the second records, those after it replay."""
    model = model_on(place, random_engine_file(SMALL, graph, seed=seed))
    inputs = [images_for(SMALL, batch, seed + batch).cuda() for batch in (3, 1, 2)]
    wanted = [model.forward_checked(x) for x in inputs]
    for _ in range(4):
        for x, expected in zip(inputs, wanted):
            assert torch.equal(model(x), expected)
    other = images_for(SMALL, 3, seed + 9).cuda()
    assert torch.equal(model(other), model.forward_checked(other)), "a replay must read the new images"


def test_a_later_call_launches_one_graph(micro, stream, seed):
    images = images_for(MICRO_DIGITS, 2, seed).cuda()
    for _ in range(3):
        micro(images)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        micro(images)
        torch.cuda.synchronize()
    calls = {event.key: event.count for event in profile.key_averages() if event.key.startswith("cuda")}
    if not any("Launch" in name for name in calls):
        pytest.skip("PyTorch's profiler sees no launches on this machine")
    assert sum(count for name, count in calls.items() if name.startswith("cudaGraphLaunch")) == 1, calls
    outside = sum(count for name, count in calls.items() if name.startswith("cudaLaunchKernel"))
    assert outside <= 6, f"patch embedding, pooling and head alone are no part of it: {calls}"


@pytest.mark.parametrize("graph", ENGINE_GRAPHS)
@pytest.mark.parametrize("calls_before", [1, 2, 4])
def test_a_callers_cuda_graph_takes_forward_passes(graph, calls_before, seed):
    """As PyTorch's notes have it: warm up on a side stream, capture, replay; what other shapes do meanwhile changes nothing."""
    model = SwinInt8.from_engine_file(random_engine_file(SMALL, graph, seed=seed)).to("cuda")
    static = images_for(SMALL, 3, seed).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(calls_before):
            model(static)
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        doubled = 2 * model(static)
    for i in range(8):
        other = images_for(SMALL, 3, seed + i).cuda()
        static.copy_(other)
        recorded.replay()
        found = doubled.clone()
        assert torch.equal(found, 2 * model(other))
        model(images_for(SMALL, 1 + i, seed).cuda())


def test_a_capture_without_a_call_before_it_is_refused(micro, seed):
    images = images_for(MICRO_DIGITS, 2, seed).cuda()
    with pytest.raises(RuntimeError, match="run one forward pass before the capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            micro(images)
    torch.cuda.synchronize()
    assert micro(images).isfinite().all()


@pytest.mark.parametrize("provider", ["swin_plain", "swin_tiles", "cutlass"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_every_provider_runs_the_fused_graph(monkeypatch, tmp_path, place, provider, activation, seed):
    if provider == "cutlass":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("CUTLASS's kernels with a scale per channel are Hopper's")
        if not next(p["built"] for p in cuda_info()["providers"] if p["provider"] == provider):
            pytest.skip("this engine was built without CUTLASS's headers")
    monkeypatch.setenv("SWIN_GEMM", provider)
    monkeypatch.setenv("SWIN_GEMM_CONFIG", str(tmp_path / "gemm.json"))
    file = random_engine_file(MICRO_DIGITS, FUSED_GRAPH, seed=seed, activation=activation)
    images = images_for(MICRO_DIGITS, 8, seed)
    wanted = SwinInt8.from_engine_file(file)(images)
    assert sqnr_db(model_on(place, file)(images.cuda()).cpu(), wanted) > LOGITS_BOUND_DB


def test_any_batch_gives_the_same_rows(micro, seed):
    images = images_for(MICRO_DIGITS, 512, seed).cuda()
    whole = micro(images)
    for batch in (1, 2, 7, 128, 511):
        torch.testing.assert_close(micro(images[:batch]), whole[:batch], rtol=1e-5, atol=1e-5)


def test_several_streams_at_once(micro, seed):
    inputs = [images_for(MICRO_DIGITS, 1 + i % 3, seed + i).cuda() for i in range(6)]
    wanted = [micro(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found = [[] for _ in inputs]
    for _ in range(20):
        for stream, x, results in zip(streams, inputs, found):
            with torch.cuda.stream(stream):
                results.append(micro(x))
    torch.cuda.synchronize()
    for results, expected in zip(found, wanted):
        assert all(torch.equal(result, expected) for result in results)


def test_several_threads_and_engines_at_once(seed):
    models = [
        SwinInt8.from_engine_file(random_engine_file(MICRO_DIGITS, graph, seed=seed)).to("cuda") for graph in GRAPHS
    ]
    work = [(models[i % 2], images_for(MICRO_DIGITS, 1 + i % 3, seed + i).cuda()) for i in range(6)]
    wanted = [model(x) for model, x in work]
    torch.cuda.synchronize()
    wrong = []

    def run(model, x, expected):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                if not torch.equal(model(x), expected):
                    wrong.append(x.shape)

    threads = [threading.Thread(target=run, args=(*pair, expected)) for pair, expected in zip(work, wanted)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_forward_does_not_wait_for_the_device(micro, seed):
    images = images_for(MICRO_DIGITS, 2, seed).cuda()
    for _ in range(3):
        micro(images)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # a second, more or less
    started = time.perf_counter()
    micro(images)
    elapsed = time.perf_counter() - started
    done.record()
    assert not done.query(), "the device was idle before the call came back"
    assert elapsed < 0.2
    torch.cuda.synchronize()


def test_forward_allocates_nothing_once_it_runs(micro, seed):
    images = images_for(MICRO_DIGITS, 64, seed).cuda()
    for _ in range(3):
        micro(images)
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(50):
        micro(images)
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] == before


def test_ops_are_timed(micro, seed):
    times = micro.time_ops(images_for(MICRO_DIGITS, 8, seed).cuda(), runs=3)
    assert len(times) == len(micro.ops(8)) and all(0 < t < 1000 for t in times)


def test_weights_changed_in_place_are_noticed(micro, seed):
    images = images_for(MICRO_DIGITS, 2, seed).cuda()
    before = [micro(images) for _ in range(3)][-1]
    micro._weights()[-1].add_(1.0)
    torch.testing.assert_close(micro(images), before + 1.0, rtol=0, atol=1e-2)


def test_images_on_the_cpu_are_refused(micro):
    with pytest.raises(NotImplementedError, match="images are on cpu, the model is on cuda:0; move one of them"):
        micro(torch.zeros(1, 1, 28, 28))


def test_an_image_with_nan_leaves_the_others_alone(micro, seed):
    """On a GPU such an image is not refused, which would take waiting for the device."""
    images = images_for(MICRO_DIGITS, 3, seed).cuda()
    wanted = micro(images)
    images[1, 0, 5, 5] = torch.nan
    found = micro(images)
    assert torch.equal(found[[0, 2]], wanted[[0, 2]])


def test_float32_residual_is_refused(seed):
    file = random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed)
    with pytest.raises(NotImplementedError, match="on CUDA it is float16 or bfloat16"):
        SwinInt8.from_engine_file(file, residual="float32").to("cuda")(torch.zeros(1, 1, 28, 28, device="cuda"))


def test_the_other_device(seed):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU alone on this machine")
    file = random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed)
    images = images_for(MICRO_DIGITS, 2, seed)
    found = [SwinInt8.from_engine_file(file).to(f"cuda:{i}")(images.to(f"cuda:{i}")).cpu() for i in (0, 1)]
    assert torch.equal(*found)
