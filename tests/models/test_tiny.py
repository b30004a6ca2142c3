"""The tiny models are fit to test with: they run, they are random all over, and they survive a checkpoint."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

import tiny

MIXTURES = [
    name
    for name, config in tiny.ARCHITECTURES.items()
    if MODEL_FOR_CAUSAL_LM_MAPPING[type(config())]._can_set_experts_implementation()
]

every_architecture = pytest.mark.parametrize("name", tiny.ARCHITECTURES)
# By turns an architecture has one of three in the tests that are not slow; test_stream.py loads and runs them all.
turns = [tiny.by_turns(tiny.ARCHITECTURES, turn) for turn in range(3)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def logits(model: PreTrainedModel, seed: int = 0) -> torch.Tensor:
    return model(tiny.tokens(seed=seed), use_cache=False).logits


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


def test_enough_architectures():
    kinds = {config().model_type for config in tiny.ARCHITECTURES.values()}
    assert len(kinds) >= 42
    assert len(MIXTURES) >= 10
    if Version(transformers.__version__) >= Version("5.17"):
        assert not tiny.NOT_HERE


def test_tokens():
    ids = tiny.tokens(samples=3, length=20, seed=1)
    assert ids.shape == (3, 20)
    assert ids.min() >= tiny.RESERVED
    assert ids.max() < tiny.VOCABULARY
    assert torch.equal(ids, tiny.tokens(samples=3, length=20, seed=1))
    assert not torch.equal(ids, tiny.tokens(samples=3, length=20, seed=2))


def test_build_is_seeded_and_keeps_the_random_state():
    state = torch.random.get_rng_state()
    first, again, other = tiny.build("mixtral"), tiny.build("mixtral"), tiny.build("mixtral", seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
        assert not torch.equal(value, other.state_dict()[key]), key


def test_build_in_another_dtype():
    model = tiny.build("llama", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@every_architecture
def test_forward(name):
    model = tiny.build(name)
    assert not model.training
    one, two = logits(model), logits(model, seed=1)
    assert one.shape == (4, 16, tiny.VOCABULARY)
    assert one.isfinite().all()
    assert torch.equal(one, logits(model))
    assert one.std() > 0.1
    assert (one - two).abs().mean() > 0.1


@turns[0]
def test_samples_do_not_mix(name):
    model, ids = tiny.build(name), tiny.tokens()
    with torch.no_grad():
        alone = torch.cat([model(sample[None], use_cache=False).logits for sample in ids])
    torch.testing.assert_close(alone, logits(model), rtol=1e-4, atol=1e-4)


@every_architecture
def test_causal(name):
    """A later token has no say in an earlier one's logits, an earlier token has in a later one's."""
    model, ids = tiny.build(name), tiny.tokens()
    late, early = ids.clone(), ids.clone()
    late[:, -1] = (late[:, -1] + 1 - tiny.RESERVED) % (tiny.VOCABULARY - tiny.RESERVED) + tiny.RESERVED
    early[:, -3] = (early[:, -3] + 1 - tiny.RESERVED) % (tiny.VOCABULARY - tiny.RESERVED) + tiny.RESERVED
    with torch.no_grad():
        before, after_late, after_early = (model(batch, use_cache=False).logits for batch in (ids, late, early))
    torch.testing.assert_close(after_late[:, :-1], before[:, :-1], rtol=1e-4, atol=1e-4)
    assert (after_early[:, -1] - before[:, -1]).abs().max() > 1e-4


@every_architecture
def test_no_weight_is_left_constant(name):
    for key, parameter in tiny.build(name).named_parameters():
        if parameter.numel() > 1:
            assert parameter.std() > 0.01, key
            assert (parameter != 0).all(), key


@turns[1]
def test_three_blocks_that_all_matter(name):
    model = tiny.build(name)
    before = logits(model)
    layers = blocks(model)
    assert len(layers) == tiny.BLOCKS
    for block in layers:
        kept = {key: value.clone() for key, value in block.state_dict().items()}
        with torch.no_grad():
            for parameter in block.parameters():
                parameter *= 1.1
        assert (logits(model) - before).abs().max() > 1e-3
        block.load_state_dict(kept)
    assert torch.equal(logits(model), before)


@turns[2]
def test_checkpoint(name, tmp_path):
    folder = tiny.save(name, tmp_path / name)
    assert list(folder.glob("*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    built = tiny.build(name)
    assert type(loaded) is type(built)
    assert torch.equal(logits(loaded), logits(built))


@pytest.mark.parametrize("name", MIXTURES)
def test_eager_experts(name):
    model = tiny.build(name)
    before = logits(model)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(logits(model), before)
