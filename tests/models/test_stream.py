"""Streaming is the model's own forward: block by block from a folder, for every architecture."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import secateur
import tiny
from mapped_files import mapped_files
from secateur.errors import ModelStructureError
from secateur.models.flow import stream as module
from secateur.models.flow.stream import HiddenStates, Stream, states_folder
from secateur.models.opening.opened import open_model
from secateur.models.shape.skeleton import Skeleton, loaded

# Architectures whose structure cannot be streamed: {name: (why, what the error says)}.
NOT_STREAMED = {"hrm_text": ("runs the same blocks several times", r"in the order 0, 1, 2, 0, 1, 2, .* expected each")}
STREAMED = [name for name in tiny.ARCHITECTURES if name not in NOT_STREAMED]
TOLERANCE = 1e-5


def opened(name: str, folder: Path) -> Skeleton:
    return open_model(tiny.save(name, folder)).skeleton


def own_logits(folder: Path, ids: Tensor) -> Tensor:
    """The logits of the model as transformers loads and runs it, experts one by one."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(ids, use_cache=False).logits[:, :-1]


@torch.no_grad()
def replay(skeleton: Skeleton, stream: Stream) -> None:
    for block in skeleton.blocks:
        with loaded(skeleton, block, skeleton.read(block)):
            for batch in range(len(stream.batches)):
                stream.states.put(batch, stream.run(block, batch))


def stream_logits(skeleton: Skeleton, ids: Tensor, batch_size: int, chunk: int = 512) -> Tensor:
    skeleton.load_outside()
    stream = Stream(skeleton, torch.split(ids, batch_size))
    replay(skeleton, stream)
    parts = []
    for batch, own in enumerate(stream.batches):
        pieces = list(stream.logits(batch, chunk))
        assert torch.equal(torch.cat([piece for piece, _ in pieces], dim=1), own[:, 1:])
        parts.append(torch.cat([logits for _, logits in pieces], dim=1))
    return torch.cat(parts)


def distance(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def assert_as_before(skeleton: Skeleton, modules: dict[str, nn.Module]) -> None:
    """No stub and no weight of a block is left in the model."""
    now = dict(skeleton.model.named_modules())
    assert list(now) == list(modules)
    assert all(now[path] is module for path, module in modules.items())
    for block in skeleton.blocks:
        assert skeleton.model.get_submodule(block.path) is block.module
        assert all(parameter.is_meta for parameter in block.module.parameters())


@pytest.mark.parametrize("name", ["llama_tied", "gemma3_text", "gemma3n_text", "gptj", "deepseek_v3", "rwkv", "zamba2"])
def test_a_skeleton_has_the_buffers_of_the_model(name, tmp_path):
    """They are computed when transformers initialises a model; no number is drawn for parameters that are not there."""
    skeleton, model = opened(name, tmp_path).model, tiny.build(name)
    expected = dict(model.named_buffers())
    buffers = dict(skeleton.named_buffers())
    assert buffers.keys() == expected.keys()
    stored = set(model.state_dict())
    for key, value in buffers.items():
        assert key in stored or torch.equal(value, expected[key]), key
    assert skeleton.state_dict().keys() == stored


def test_nothing_is_left_out_unawares():
    left = [name for name in NOT_STREAMED if name in tiny.ARCHITECTURES]
    assert len(STREAMED) + len(left) == len(tiny.ARCHITECTURES) >= 90


@pytest.mark.parametrize("name", STREAMED)
def test_replay_is_the_forward(name, tmp_path):
    skeleton = opened(name, tmp_path / "source")
    ids = tiny.tokens(samples=3, length=16)
    expected = own_logits(tmp_path / "source", ids)
    modules = dict(skeleton.model.named_modules())
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())

    whole = stream_logits(skeleton, ids, batch_size=3)
    assert distance(whole, expected) <= TOLERANCE
    assert_as_before(skeleton, modules)

    # Batches of two and one, and a head that sees five tokens at a time.
    assert distance(stream_logits(skeleton, ids, batch_size=2, chunk=5), expected) <= TOLERANCE
    assert_as_before(skeleton, modules)


@tiny.by_turns(STREAMED, 0)
def test_a_block_may_run_twice(name, tmp_path):
    """The engine runs each block for its statistics, and again once it is pruned: its inputs must stay as they are."""
    skeleton = opened(name, tmp_path)
    skeleton.load_outside()
    stream = Stream(skeleton, torch.split(tiny.tokens(samples=2, length=12), 2))
    with torch.no_grad():
        for block in skeleton.blocks:
            with loaded(skeleton, block, skeleton.read(block)):
                before = stream.states.get(0, skeleton.device).clone()
                first = stream.run(block, 0).clone()
                assert torch.equal(stream.states.get(0, skeleton.device), before)
                second = stream.run(block, 0)
                assert torch.equal(second, first)
                assert not torch.equal(second, before)
            stream.states.put(0, second)


@pytest.mark.parametrize("name", NOT_STREAMED)
def test_what_cannot_be_streamed_says_so(name, tmp_path):
    skeleton = opened(name, tmp_path / "source")
    modules = dict(skeleton.model.named_modules())
    skeleton.load_outside()
    with pytest.raises(ModelStructureError, match=NOT_STREAMED[name][1]):
        Stream(skeleton, torch.split(tiny.tokens(), 2), states_folder=tmp_path / "states")
    assert_as_before(skeleton, modules)
    assert list((tmp_path / "states").iterdir()) == []


def test_a_model_that_works_between_its_blocks_says_so(tmp_path, monkeypatch):
    """RWKV halves its hidden states every few blocks, outside of them, and its weights to match."""
    monkeypatch.setitem(tiny.TABLE, "rwkv", tiny.TABLE["rwkv"] | {"rescale_every": 2})
    skeleton = opened("rwkv", tmp_path)
    skeleton.load_outside()
    with pytest.raises(ModelStructureError, match=r"changes the hidden states between block 1 and block 2"):
        Stream(skeleton, torch.split(tiny.tokens(), 2))


def test_a_failure_while_recording_leaves_nothing(tmp_path):
    skeleton = opened("llama", tmp_path / "source")
    modules = dict(skeleton.model.named_modules())
    skeleton.load_outside()

    def interrupt(done: int, total: int) -> None:
        assert len(mapped_files(tmp_path / "states")) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stream(skeleton, torch.split(tiny.tokens(), 2), states_folder=tmp_path / "states", progress=interrupt)
    assert_as_before(skeleton, modules)
    assert list((tmp_path / "states").iterdir()) == []


@pytest.mark.parametrize("name", ["llama", "gemma3n_text", "opt_postnorm", "rwkv"])
def test_states_on_disk_equal_those_in_memory(name, tmp_path):
    skeleton = opened(name, tmp_path / "source")
    skeleton.load_outside()
    ids = tiny.tokens(samples=5, length=12)
    folder = tmp_path / "deep" / "states"
    in_memory = Stream(skeleton, torch.split(ids, 2))
    on_disk = Stream(skeleton, torch.split(ids, 2), states_folder=folder)
    for block in skeleton.blocks:
        with loaded(skeleton, block, skeleton.read(block)), torch.no_grad():
            for batch in range(3):
                kept, mapped = (stream.states.get(batch, skeleton.device) for stream in (in_memory, on_disk))
                assert torch.equal(kept, mapped)
                for stream in (in_memory, on_disk):
                    stream.states.put(batch, stream.run(block, batch))
                assert len(mapped_files(folder)) == 3
                assert sum(mapped_files(folder)) >= mapped.nbytes
    assert list(folder.iterdir()) == [], "files have no name"
    for batch in range(3):
        for (_, one), (_, two) in zip(in_memory.logits(batch, 12), on_disk.logits(batch, 12), strict=True):
            assert torch.equal(one, two)
    del mapped
    on_disk.close()
    on_disk.close()
    assert mapped_files(folder) == []
    in_memory.close()
    with pytest.raises(RuntimeError, match="no hidden states"):
        in_memory.states.get(0, skeleton.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("on_disk", [False, True])
def test_hidden_states(dtype, on_disk, tmp_path):
    states = HiddenStates(2, tmp_path / "states" if on_disk else None)
    cpu = torch.device("cpu")
    first, second = torch.randn(2, 3, 4).to(dtype), torch.randn(1, 3, 4).to(dtype)
    states.put(0, first)
    states.put(1, second)
    assert torch.equal(states.get(0, cpu), first)
    assert torch.equal(states.get(1, cpu), second)
    states.put(0, first + 1)
    assert torch.equal(states.get(0, cpu), first + 1)
    assert torch.equal(states.get(1, cpu), second)
    assert states.get(0, cpu).dtype == dtype
    states.close()
    assert mapped_files(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at the process as Linux shows it")
def test_a_killed_process_leaves_no_hidden_states(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
import torch
from secateur.models.flow.stream import HiddenStates
states = HiddenStates(2, Path(sys.argv[1]))
states.put(0, torch.ones(1 << 20))
print(Path("/proc/self/maps").read_text().count(" (deleted)"), os.listdir(sys.argv[1]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "1 []\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_states_folder(tmp_path):
    scratch = tmp_path / "out.states"
    assert states_folder("never", 1 << 60, scratch) is None
    assert states_folder("auto", 1, scratch) is None
    assert states_folder("auto", 1 << 60, scratch) == scratch
    assert states_folder(str(tmp_path / "fast"), 1, scratch) == tmp_path / "fast"


def test_aside_forgets_what_is_left_for_later_blocks(tmp_path):
    """Gemma 3n's third block reads keys and values that the second one leaves behind."""
    skeleton = opened("gemma3n_text", tmp_path)
    skeleton.load_outside()
    stream = Stream(skeleton, torch.split(tiny.tokens(samples=2, length=12), 2))
    replay_two, last = skeleton.blocks[:2], skeleton.blocks[2]
    with torch.no_grad():
        for block in replay_two:
            with loaded(skeleton, block, skeleton.read(block)) as module:
                output = stream.run(block, 0)
                for parameter in module.parameters():
                    parameter.zero_()
                assert not torch.equal(stream.run(block, 0, aside=True), output)
            stream.states.put(0, output)
        with loaded(skeleton, last, skeleton.read(last)):
            stream.states.put(0, stream.run(last, 0))
    ((_, logits),) = stream.logits(0, 12)
    assert distance(logits, own_logits(tmp_path, stream.batches[0])) <= TOLERANCE


def test_equal_masks_of_many_batches_are_kept_once(tmp_path):
    skeleton = opened("gemma2", tmp_path)
    skeleton.load_outside()
    stream = Stream(skeleton, torch.split(tiny.tokens(samples=6, length=12), 2))
    for block in skeleton.blocks:
        calls = [calls[block.index] for calls in stream._calls]
        tensors = [{k: v for k, v in call.kwargs.items() if isinstance(v, Tensor)} for call in calls]
        assert tensors[0]
        for other in tensors[1:]:
            assert all(other[key] is value for key, value in tensors[0].items())
    full, sliding = (stream._calls[0][index].kwargs["attention_mask"] for index in (1, 0))
    assert full is not sliding
    # Before transformers 5.17 a full causal mask is none at all.
    assert not torch.equal(full, sliding) if full is not None else sliding is not None


def test_a_module_in_memory_streams_as_itself():
    model = tiny.build("mixtral")
    skeleton = open_model(model).skeleton
    ids = tiny.tokens(samples=3, length=16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, :-1]
    assert distance(stream_logits(skeleton, ids, batch_size=2), expected) <= TOLERANCE
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [type(block) for block in model.model.layers] == [type(model.model.layers[0])] * tiny.BLOCKS
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits[:, :-1], expected)


def test_half_precision_follows_transformers(tmp_path):
    tiny.save("llama", tmp_path)
    ids = tiny.tokens(samples=2, length=16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, :-1]
    got = stream_logits(open_model(tmp_path, dtype="bfloat16").skeleton, ids, batch_size=2)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_logits_of_a_large_vocabulary_come_in_small_pieces(tmp_path, monkeypatch):
    source = tiny.save("llama", tmp_path / "source")
    ids = tiny.tokens(samples=2, length=33)
    whole = secateur.perplexity(source, ids)
    monkeypatch.setattr(module, "LOGITS_BYTES", 1)
    sizes: list[int] = []
    parts = Stream._parts
    monkeypatch.setattr(Stream, "_parts", lambda *args: (sizes.append(args[2]), parts(*args))[1])
    assert secateur.perplexity(source, ids).window_nats == pytest.approx(whole.window_nats, rel=1e-6)
    assert sizes == [16]
