"""Whole models on the engine: against the golden reference, from several threads, compiled, exported, and misused."""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing
import platform
import threading
import time

import pytest
import torch
from op_targets import CPU_VARIANTS, CUDA_PARAMS, Target, target
from op_walk import walk

from pyharness import engine
from pyharness.config import GRAPHS, MICRO_DIGITS, SwinConfig
from pyharness.engine import SwinInt8
from pyharness.engine_file import EngineFile
from pyharness.errors import EngineError
from pyharness.ft_format import FIELD_BY_NAME, decode_scales, encode_scales
from pyharness.random_engine import random_engine_file
from pyharness.reference import Node, ReferenceSwin

engine.load()

SQNR_BOUND_DB = 90.0
"""Logits of the engine against the reference that resolves rounding ties as the engine did (`golden_logits`). What is
left is float32 against float64, 120 dB and more; test_the_bound_is_broken_by shows what falls below. Without following
the ties one of them near the input leaves about 40 dB, which would hide a small error."""

BLOCK_OPS = [
    "norm1_shift_partition", "qkv_gemm", "qkv_bias", "qk_gemm", "softmax", "pv_gemm", "proj_gemm",
    "proj_bias_residual_norm2", "fc1_gemm", "fc1_bias_gelu", "fc2_gemm", "fc2_bias_residual",
]  # fmt: skip
MERGE_OPS = ["patch_merge_norm", "reduction_gemm", "reduction_dequantize"]

SMALL = SwinConfig("small", (32, 32), 2, 3, 7, 24, (2, 2, 1), (2, 3, 4), (4, 4, 4))
CONFIGS = {
    "micro": MICRO_DIGITS,
    "three stages, head size 12 to 24": SMALL,
    "not square": dataclasses.replace(SMALL, img_size=(32, 64)),
    "qk_scale": dataclasses.replace(SMALL, qk_scale=0.11),
    "no qkv bias": dataclasses.replace(SMALL, qkv_bias=False),
    "no patch norm": dataclasses.replace(SMALL, patch_norm=False),
    "features only": dataclasses.replace(SMALL, num_classes=0),
    "mlp ratio 2.5": dataclasses.replace(SMALL, mlp_ratio=2.5),
    "window larger than any resolution": dataclasses.replace(SMALL, window_size=(20, 20, 20)),
    "a window per stage": dataclasses.replace(SMALL, window_size=(8, 2, 4)),
    "window 12": dataclasses.replace(SMALL, img_size=(96, 96), patch_size=4, window_size=(12, 12, 12), depths=(2, 1, 1)),
    "window 16": dataclasses.replace(SMALL, img_size=(64, 64), window_size=(16, 16), depths=(2, 2), num_heads=(2, 3)),
    "padded": dataclasses.replace(SMALL, img_size=(36, 44)),  # 18x22 tokens, 9x11, which are odd, then 5x6
    "padded ahead of the shift": dataclasses.replace(SMALL, img_size=(36, 44), pad_first=True),
    "one stage": dataclasses.replace(SMALL, depths=(3,), num_heads=(3,), window_size=(4,)),
}


def images_for(config: SwinConfig, batch: int, seed: int) -> torch.Tensor:
    """Distinct normalized images [batch, in_chans, H, W] with structure, so that windows differ."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn((batch, config.in_chans, 4, 4), generator=rng)
    fine = torch.randn((batch, config.in_chans, *config.img_size), generator=rng)
    return torch.nn.functional.interpolate(coarse, config.img_size, mode="bilinear") + 0.3 * fine


def sqnr_db(found: torch.Tensor, wanted: torch.Tensor) -> float:
    noise = (found.double() - wanted.double()).square().sum()
    return float(10 * torch.log10(wanted.double().square().sum() / noise.clamp(min=1e-30)))


def golden_logits(file: EngineFile, images: torch.Tensor, model: SwinInt8) -> torch.Tensor:
    """The reference's logits for `images`, ties resolved as `model` did; its int8 tensors differ nowhere else."""
    follow = {}
    for op, outputs in model.trace(images):
        node = Node(op.stage if op.stage >= 0 else None, op.block if op.block >= 0 else None, op.name)
        result = outputs[-1]
        if op.name in ("qk_gemm", "softmax"):
            result = result[..., : result.shape[2]]  # the columns behind are padding
        if result.dtype == torch.int8:
            follow[node] = result
    return ReferenceSwin(file)(images, follow=follow)


def agreement_db(file: EngineFile, images: torch.Tensor, model: SwinInt8) -> float:
    """SQNR of `model`'s logits against the golden ones of `file`."""
    return sqnr_db(model(images), golden_logits(file, images, model))


@pytest.fixture(params=CPU_VARIANTS)
def variant(request):
    with target(request.param):
        yield request.param


@pytest.fixture(params=["cpu", *CUDA_PARAMS])
def place(request) -> Target:
    """The CPU on its best instruction set, or the GPU with one type of residual stream."""
    return Target(request.param)


def model_on(place: Target, file: EngineFile) -> SwinInt8:
    """The engine of `file` on that device, with that type of residual stream."""
    return SwinInt8.from_engine_file(file, residual=str(place.real).removeprefix("torch.")).to(place.device)


@pytest.fixture
def micro(seed) -> SwinInt8:
    return SwinInt8.from_engine_file(random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed))


@pytest.mark.parametrize("int8_mode", [1, 2])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_engine_equals_reference(name, graph, int8_mode, seed):
    file = random_engine_file(CONFIGS[name], graph, int8_mode, seed=seed)
    images = images_for(file.config, 3, seed)
    model = SwinInt8.from_engine_file(file)
    wanted = golden_logits(file, images, model)
    for batch in (3, 1, 2):  # the batch changes from call to call
        found = model(images[:batch])
        assert found.shape == wanted[:batch].shape and found.dtype == torch.float32
        assert sqnr_db(found, wanted[:batch]) > SQNR_BOUND_DB


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_variant_equals_reference(variant, graph, seed):
    file = random_engine_file(MICRO_DIGITS, graph, seed=seed)
    images = images_for(MICRO_DIGITS, 4, seed)
    assert agreement_db(file, images, SwinInt8.from_engine_file(file)) > SQNR_BOUND_DB


@pytest.mark.parametrize("int8_mode", [1, 2])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_op_of_a_forward_pass(place, record_ties, name, graph, int8_mode, seed):
    """Each operation on the inputs that the engine itself gave it; then the logits, from the engine's last residual."""
    file = random_engine_file(CONFIGS[name], graph, int8_mode, seed=seed)
    images = images_for(file.config, 2, seed)
    model = model_on(place, file)
    wanted = walk(file, images, model, place, record_ties)
    assert sqnr_db(model(images.to(place.device)).cpu(), wanted) > SQNR_BOUND_DB


def test_the_walk_is_stopped_by_a_wrong_scale(place, record_ties, seed):
    file = random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed)
    wrong = replace_scale(file, "layers.1.blocks.0", "matmul_v", lambda a: 1.01 * a)
    with pytest.raises(AssertionError, match="stage=1, block=0, op='qkv_bias'.*off by"):
        walk(file, images_for(MICRO_DIGITS, 2, seed), model_on(place, wrong), place, record_ties)


def replace_tensor(file: EngineFile, name: str, change) -> EngineFile:
    index = file.names.index(name)
    return dataclasses.replace(file, tensors=changed_list(file, index, change))


def changed_list(file: EngineFile, index: int, change) -> list[torch.Tensor]:
    tensors = list(file.tensors)
    tensors[index] = change(tensors[index].clone())
    return tensors


def replace_scale(file: EngineFile, block: str, field: str, change) -> EngineFile:
    def edit(values: torch.Tensor) -> torch.Tensor:
        amax = decode_scales(values.tolist())
        amax[field] = change(amax[field])
        return torch.tensor(encode_scales(amax, file.graph), dtype=torch.float32)

    for copy in ("amaxList", "h_amaxList"):
        file = replace_tensor(file, f"{block}.{copy}", edit)
    return file


MUTATIONS = {
    **{
        f"{field} 10 % off": lambda f, field=field: replace_scale(f, "layers.0.blocks.1", field, lambda a: 1.1 * a)
        for field in ("qkv_aftergemm", "matmul_v", "proj_aftergemm", "fc2_input", "fc2_weight", "fc2_aftergemm")
    },
    "reduction scale 10 % off": lambda f: replace_scale(f, "layers.0.blocks.1", "reduction_aftergemm", lambda a: 1.1 * a),
    **{
        f"no {name}": lambda f, name=name: replace_tensor(f, name, torch.zeros_like)
        for name in (
            "layers.0.blocks.1.attn.qkv.bias", "layers.0.blocks.0.attn.proj.bias", "layers.0.blocks.1.mlp.fc2.bias",
            "layers.1.blocks.0.norm2.bias", "layers.0.blocks.1.attn.relative_position_bias", "layers.0.downsample.norm.bias",
            "patch_embed.proj.bias", "head.bias", "layers.0.attn_mask",
        )
    },
    "no FC1 bias": lambda f: replace_tensor(f, "layers.1.blocks.1.mlp.fc1.bias", torch.zeros_like),
    "one weight matrix transposed": lambda f: replace_tensor(f, "layers.0.blocks.0.attn.proj.weight", lambda w: w.t().contiguous()),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_bound_is_broken_by(mutation, seed):
    file = random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed)
    images = images_for(MICRO_DIGITS, 4, seed)
    assert agreement_db(file, images, SwinInt8.from_engine_file(file)) > SQNR_BOUND_DB
    assert agreement_db(file, images, SwinInt8.from_engine_file(MUTATIONS[mutation](file))) < SQNR_BOUND_DB


def test_the_bound_is_broken_by_a_window_that_shifts_wrongly(seed):
    """One token less to shift by, in one of the two directions."""
    file = random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed)
    images = images_for(MICRO_DIGITS, 4, seed)

    class MisShifted(ReferenceSwin):
        def _block(self, x, stage, block, record):
            shift = (stage.shift[0] - 1, stage.shift[1]) if any(stage.shift) else stage.shift
            return super()._block(x, dataclasses.replace(stage, shift=shift), block, record)

    found = SwinInt8.from_engine_file(file)(images)
    assert sqnr_db(found, MisShifted(file)(images)) < SQNR_BOUND_DB


@pytest.mark.parametrize("graph", GRAPHS)
def test_op_sequence(graph, seed):
    model = SwinInt8.from_engine_file(random_engine_file(MICRO_DIGITS, graph, seed=seed))
    block = [name for name in BLOCK_OPS if not (graph == "geluless_int8" and name == "fc1_bias_gelu")]
    wanted = ["patch_embed", "patch_embed_norm", *block, *block, *MERGE_OPS, *block, *block, "final_norm_pool", "head"]
    infos = model.ops(batch=3)
    assert [info.name for info in infos] == wanted
    fc1 = next(info for info in infos if info.name == "fc1_gemm")
    rows, c = 3 * 14 * 14, 32
    assert (fc1.stage, fc1.block, fc1.kind, fc1.shape) == (0, 0, "gemm", f"M={rows} N={4 * c} K={c}")
    assert fc1.operations == 2 * rows * 4 * c * c
    assert (fc1.bytes_read, fc1.bytes_written) == (rows * c + 4 * c * c, rows * 4 * c)


def test_poisoned_outputs_change_nothing(seed):
    for graph in GRAPHS:
        for int8_mode in (1, 2):
            model = SwinInt8.from_engine_file(random_engine_file(SMALL, graph, int8_mode, seed=seed))
            images = images_for(SMALL, 2, seed)
            assert torch.equal(model.forward_checked(images), model(images))


def test_features_are_what_the_head_sees(micro, seed):
    images = images_for(MICRO_DIGITS, 2, seed)
    features = micro.forward_features(images)
    weight, bias = micro._weights()[-2:]
    torch.testing.assert_close(features @ weight.float().T + bias.float(), micro(images), rtol=1e-4, atol=1e-5)


def test_ops_can_be_left_out_and_timed(micro, seed):
    images = images_for(MICRO_DIGITS, 2, seed)
    whole, other = micro(images), images_for(MICRO_DIGITS, 2, seed + 1)
    for name in sorted({info.name for info in micro.ops(2)} - {"head"}):
        micro(other)  # what an op leaves out may lie in memory that still holds the last call's
        assert not torch.equal(micro.forward_without(images, [name]), whole), name
    assert torch.equal(micro(images), whole)
    times = micro.time_ops(images, runs=2)
    assert len(times) == len(micro.ops(2)) and all(t > 0 for t in times)
    with pytest.raises(ValueError, match="no operation 'gelu' to leave out"):
        micro.forward_without(images, ["gelu"])


def test_threads_do_not_change_the_result(micro, seed):
    images = images_for(MICRO_DIGITS, 3, seed)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(micro(images))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_several_python_threads_share_one_engine(micro, seed):
    inputs = [images_for(MICRO_DIGITS, 1 + i % 3, seed + i) for i in range(6)]
    wanted = [micro(x) for x in inputs]
    wrong = []

    def work(x, expected):
        for _ in range(20):
            if not torch.equal(micro(x), expected):
                wrong.append(x.shape)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, wanted)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_forward_releases_the_gil(seed):
    model = SwinInt8.from_engine_file(random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed))
    images = images_for(MICRO_DIGITS, 1, seed).expand(3000, -1, -1, -1).contiguous()
    started, finished = threading.Event(), []

    def work():
        started.set()
        model(images)
        finished.append(time.perf_counter())

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    time.sleep(0.02)  # asks for the GIL again: without its release this line would last as long as the call
    awake = time.perf_counter()
    thread.join()
    assert awake < finished[0]


def _child(pipe, tensors, images):
    model = SwinInt8(tensors, MICRO_DIGITS, "ft_int8")
    torch.set_num_threads(2)
    pipe.send(model(images).tolist())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_run_it(micro, seed):
    """Data loaders fork; a child inherits the pool's memory but none of its threads."""
    images = images_for(MICRO_DIGITS, 2, seed)
    torch.set_num_threads(2)
    wanted = micro(images)
    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_child, args=(there, micro._weights(), images))
    process.start()
    assert here.poll(60), "the forked child hangs"
    found = torch.tensor(here.recv())
    process.join()
    assert torch.equal(found, wanted)


def test_models_go_on_while_another_is_packed(micro, seed):
    """Its first call takes hundreds of times as long as one of theirs, most of all with AVX2."""
    wide = SwinConfig("wide", (16, 16), 4, 3, 7, 1536, (1,), (16,), (4,))
    other = SwinInt8.from_engine_file(random_engine_file(wide, "fused_int8", seed=seed))
    images = images_for(MICRO_DIGITS, 1, seed)
    started, packed = threading.Event(), []

    def work():
        started.set()
        other(torch.zeros(1, 3, 16, 16))
        packed.append(time.perf_counter())

    with target("avx2"):
        micro(images)
        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        time.sleep(0.005)
        began = time.perf_counter()
        micro(images)
        done = time.perf_counter()
        thread.join()
    assert done - began < (packed[0] - began) / 2


def _from_several_threads(count, call):
    """What `call` gave or raised in each thread, all beginning together."""
    barrier, found = threading.Barrier(count), []

    def work():
        barrier.wait()
        try:
            found.append(call())
        except ValueError as error:
            found.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_first_calls_of_several_threads_pack_once(seed):
    """One packs and the others wait for it, also where it fails; then the next call tries again."""
    images = images_for(SMALL, 1, seed)
    file = random_engine_file(SMALL, "ft_int8", seed=seed)
    wanted = SwinInt8.from_engine_file(file)(images)
    for _ in range(5):
        model = SwinInt8.from_engine_file(file)
        found = _from_several_threads(6, lambda model=model: model(images))
        assert len(found) == 6 and all(torch.equal(wanted, one) for one in found)
    broken = SwinInt8.from_engine_file(file)
    amax = broken._weights()[file.names.index("layers.0.blocks.0.amaxList")]
    right = amax.clone()
    amax.fill_(float("nan"))
    for _ in range(2):
        found = _from_several_threads(6, lambda: broken(images))
        assert len(found) == 6 and all(isinstance(one, str) and "amaxList" in one for one in found), found
    amax.copy_(right)
    assert torch.equal(broken(images), wanted)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of a rounding mode is x86's")
@pytest.mark.parametrize("graph", ["ft_int8", "fused_int8"])
def test_a_callers_rounding_is_his_own(graph, seed):
    """Packed and run while the thread rounds up: the same bits, and it rounds up afterwards."""
    libm, upward = ctypes.CDLL("libm.so.6"), 0x800
    file, images = random_engine_file(SMALL, graph, seed=seed), images_for(SMALL, 2, seed)
    wanted, model = SwinInt8.from_engine_file(file)(images), SwinInt8.from_engine_file(file)
    before = libm.fegetround()
    assert libm.fesetround(upward) == 0
    try:
        found, after = model(images), libm.fegetround()
    finally:
        libm.fesetround(before)
    assert torch.equal(found, wanted) and after == upward


def test_the_same_memory_in_another_layout_is_another_model(micro, seed):
    """Square weights transposed in place of themselves: the same memory, sizes and states."""
    images = images_for(MICRO_DIGITS, 2, seed)
    plain = micro._weights()
    turned = [w.t() if w.dim() == 2 and w.shape[0] == w.shape[1] else w for w in plain]

    def logits(weights):
        return torch.ops.swin_int8.forward(images, weights, *micro._config_args(), [], False, False)

    first, wanted = logits(plain), logits([w.clone() for w in turned])
    assert torch.equal(logits(turned), wanted) and not torch.equal(first, wanted)
    assert torch.equal(logits(plain), first)


def test_models_that_share_weights_keep_their_engines(micro, seed):
    """One backbone with two heads, called in turn: packed once each. What packs them again shows in a change that torch's
    version counter does not see."""
    images = images_for(MICRO_DIGITS, 1, seed)
    first = micro._weights()
    second = [*first[:-1], first[-1] + 1.0]

    def logits(weights):
        return torch.ops.swin_int8.forward(images, weights, *micro._config_args(), [], False, False)

    wanted = [logits(first), logits(second)]
    first[-2].numpy()[:] = 0
    for _ in range(3):
        assert [torch.equal(logits(w), x) for w, x in zip((first, second), wanted)] == [True, True]


def test_in_place_changes_and_dropped_models_are_noticed(micro, seed):
    images = images_for(MICRO_DIGITS, 2, seed)
    before = micro(images)
    head_bias = micro._weights()[-1]
    head_bias += 1.0
    torch.testing.assert_close(micro(images), before + 1.0, rtol=0, atol=1e-3)
    other = SwinInt8.from_engine_file(random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed + 1))
    assert not torch.equal(other(images), micro(images))
    del micro
    assert other(images).shape == (2, 10)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_casts_leave_the_weights_as_they_are(micro, cast, seed):
    images = images_for(MICRO_DIGITS, 2, seed)
    expected, state = micro(images), {name: tensor.clone() for name, tensor in micro.state_dict().items()}
    found = micro.to(torch.float16) if cast == "to" else getattr(micro, cast)()
    assert found is micro and torch.equal(micro(images), expected)
    for name, tensor in micro.to("cpu").state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
    moved = micro.to("meta", torch.float16)
    assert all(tensor.is_meta and tensor.dtype == state[name].dtype for name, tensor in moved.state_dict().items())


def test_its_repr_says_what_it_is(micro):
    said = "SwinInt8('swin_micro_digits', graph='ft_int8', img_size=28x28, num_classes=10)"
    assert repr(micro) == said


def test_opcheck(micro, seed):
    images = images_for(MICRO_DIGITS, 2, seed)
    args = (images, micro._weights(), *micro._config_args(), [], False, False)
    torch.library.opcheck(torch.ops.swin_int8.forward.default, args)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(micro, seed, backend):
    images = images_for(MICRO_DIGITS, 2, seed)
    compiled = torch.compile(lambda x: micro(2 * x).softmax(-1), fullgraph=True, backend=backend)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(images), micro(2 * images).softmax(-1), rtol=1e-5, atol=1e-6)


def test_torch_export_saves_a_program_with_its_weights(micro, seed, tmp_path):
    images = images_for(MICRO_DIGITS, 3, seed)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(micro, (images,), dynamic_shapes={"images": {0: batch}})
    torch.export.save(program, tmp_path / "micro.pt2")
    loaded = torch.export.load(tmp_path / "micro.pt2").module()
    for count in (3, 1, 2):
        assert torch.equal(loaded(images[:count]), micro(images[:count]))


@pytest.mark.parametrize(("batch", "size"), [(0, (28, 28)), (2**62, (28, 28)), (1, (2**40, 2**40)), (1, (-28, 28))])
def test_workspaces_beyond_all_numbers_are_refused(micro, batch, size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
        micro.workspace_bytes(batch, size)


def test_gelu_less_needs_less_workspace(seed):
    """The second hidden buffer is gone with the operation that filled it."""
    sizes = {
        g: SwinInt8.from_engine_file(random_engine_file(MICRO_DIGITS, g, seed=seed)).workspace_bytes(4) for g in GRAPHS
    }
    hidden = 4 * 14 * 14 * 128
    assert sizes["ft_int8"] - sizes["geluless_int8"] == hidden + 64  # with its guard bytes


BAD_IMAGES = {
    "no whole patches": (ValueError, "image of 28x29 does not divide into patches of 2", lambda: torch.zeros(2, 1, 28, 29)),
    "wrong channels": (ValueError, r"\[2, 2, 28, 28\]; \[batch, 1, height, width\], 28x28 or another size", lambda: torch.zeros(2, 2, 28, 28)),
    "three dimensions": (ValueError, r"\[1, 28, 28\]", lambda: torch.zeros(1, 28, 28)),
    "empty batch": (ValueError, "batch of at least 1", lambda: torch.zeros(0, 1, 28, 28)),
    "uint8": (TypeError, r"images are Byte; float32 is needed", lambda: torch.zeros(1, 1, 28, 28, dtype=torch.uint8)),
    "float16": (TypeError, r"images are Half; float32 is needed", lambda: torch.zeros(1, 1, 28, 28).half()),
    "NaN": (ValueError, "image 1 of the batch holds NaN", lambda: torch.stack([torch.zeros(1, 28, 28), torch.full((1, 28, 28), torch.nan)])),
    "infinity": (ValueError, "image 0 of the batch", lambda: torch.full((1, 1, 28, 28), torch.inf)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(micro, case):
    error, message, make = BAD_IMAGES[case]
    with pytest.raises(error, match=message):
        micro(make())
    assert torch.isfinite(micro(torch.zeros(1, 1, 28, 28))).all()


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("pixel", [(0, 0, 0), (0, 13, 14), (0, 27, 27)])
def test_the_first_of_several_bad_images_is_named(micro, threads, pixel):
    images = torch.zeros(7, 1, 28, 28)
    images[3][pixel] = torch.nan
    images[4:, 0, 0, 0] = torch.inf
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(ValueError, match="image 3 of the batch holds NaN"):
            micro(images)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_images_on_a_gpu_are_refused_with_a_sentence(micro):
    with pytest.raises(NotImplementedError, match="the model is on cpu; move one of them"):
        micro(torch.zeros(1, 1, 28, 28, device="cuda"))


def list_with(name, change):
    return lambda file: changed_list(file, file.names.index(name), change)


BAD_LISTS = {
    "one tensor short": (ValueError, r"found 81 tensors; 82 are needed", lambda f: f.tensors[:-1]),
    "one tensor too many": (ValueError, r"found 83 tensors; 82", lambda f: [*f.tensors, torch.zeros(1)]),
    "weight of floats": (TypeError, r"layers.0.blocks.0.attn.qkv.weight .*found float32", list_with("layers.0.blocks.0.attn.qkv.weight", torch.Tensor.float)),
    "wrong shape": (ValueError, r"layers.1.blocks.0.norm1.weight .*\[63\].*\[64\] is needed", list_with("layers.1.blocks.0.norm1.weight", lambda t: t[:63].contiguous())),
    "amax of zero": (ValueError, r"layers.0.blocks.1 .*attn.proj._input_quantizer has amax 0; .*calibrate", lambda f: replace_scale(f, "layers.0.blocks.1", "proj_input", lambda a: 0.0).tensors),
    "negative amax": (ValueError, r"mlp.fc1._input_quantizer has amax -", lambda f: replace_scale(f, "layers.0.blocks.1", "fc1_input", lambda a: -a).tensors),
    "no reduction scale": (ValueError, r"downsample.reduction._input_quantizer", lambda f: replace_scale(f, "layers.0.blocks.0", "reduction_input", lambda a: 0.0).tensors),
    "the two copies of the scales differ": (ValueError, r"amaxList and h_amaxList differ", list_with("layers.0.blocks.0.amaxList", lambda t: t * 2)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_weight_lists(case, seed):
    error, message, change = BAD_LISTS[case]
    tensors = change(random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed))
    model = SwinInt8(tensors, MICRO_DIGITS, "ft_int8")
    with pytest.raises(error, match=message):
        model(torch.zeros(1, 1, 28, 28))


def test_gelu_list_on_the_gelu_less_graph_is_refused(seed):
    file = random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed)
    with pytest.raises(ValueError, match="no FC1 bias; a GELU checkpoint runs on the ft_int8 graph"):
        SwinInt8(file.tensors, MICRO_DIGITS, "geluless_int8")(torch.zeros(1, 1, 28, 28))


def test_nan_amax_is_refused(seed):
    file = random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed)
    index = FIELD_BY_NAME["softmax_input"].index

    def poison(values):
        values[index] = torch.nan
        return values

    for copy in ("amaxList", "h_amaxList"):
        file = replace_tensor(file, f"layers.0.blocks.0.{copy}", poison)
    with pytest.raises(ValueError, match="softmax_input_quantizer has amax nan"):
        SwinInt8.from_engine_file(file)(torch.zeros(1, 1, 28, 28))


def test_gelu_less_list_on_the_baseline_graph_is_refused(seed):
    file = random_engine_file(MICRO_DIGITS, "geluless_int8", seed=seed)
    with pytest.raises(ValueError, match=r"mlp.fc1.bias .*found float16 \[0\]; float16 \[128\] is needed"):
        SwinInt8(file.tensors, file.config, "ft_int8")(torch.zeros(1, 1, 28, 28))


def test_geluless_list_needs_no_aftergemm_scale(seed):
    """The place of fc1._aftergemm holds zeros, and the graph neither asks for it nor reads it."""
    file = random_engine_file(MICRO_DIGITS, "geluless_int8", seed=seed)
    values = file.tensors[file.names.index("layers.0.blocks.0.amaxList")]
    at = FIELD_BY_NAME["fc1_aftergemm"].index
    assert (values[at : at + 4] == 0).all()
    assert torch.isfinite(SwinInt8.from_engine_file(file)(torch.zeros(1, 1, 28, 28))).all()


def test_unknown_graph():
    with pytest.raises(EngineError, match="no graph 'relu'"):
        SwinInt8([], MICRO_DIGITS, "relu")


def test_missing_library_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("SWIN_INT8_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(EngineError, match="bash scripts/build_ft.sh"):
        engine.load.__wrapped__()
    (tmp_path / "cut.so").write_bytes(b"\x7fELF")
    monkeypatch.setenv("SWIN_INT8_LIBRARY", str(tmp_path / "cut.so"))
    with pytest.raises(EngineError, match="cannot be loaded"):
        engine.load.__wrapped__()
