"""Zeros stay zero in anybody's Trainer, whatever the optimizer does; and nothing else is changed by keeping them."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import secateur
import tiny
from command_line import save_model
from secateur.errors import ModelStructureError, PatternError

STEPS = 4


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


ROWS = Rows(tiny.tokens(samples=24, length=16))


def sparse(pattern: secateur.Pattern | None = None, name: str = "llama") -> Any:
    model = tiny.build(name)
    secateur.prune(model, method=secateur.magnitude(), pattern=pattern or secateur.Unstructured(0.5))
    return model.requires_grad_()


def removed_of(model: nn.Module) -> dict[str, Tensor]:
    """Where the matrices of a model are zero, found without the package."""
    return {
        name: value == 0
        for name, value in model.named_parameters()
        if value.dim() >= 2 and ".layers." in name and bool((value == 0).any())
    }


class Watch(TrainerCallback):
    """Looks at every step, behind the callback under test."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.removed = removed_of(model)
        self.steps = self.moments = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, removed in self.removed.items():
            gradient = self.parameters[name].grad
            assert gradient is not None
            assert not gradient[removed].any(), name
            assert gradient[~removed].any(), name

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.steps += 1
        for name, removed in self.removed.items():
            parameter = self.parameters[name]
            assert not parameter[removed].any(), name
            assert not parameter[removed].signbit().any(), name
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    assert not value[removed].any(), name
                    self.moments += 1


def trainer(
    model: Any, folder: Path, *callbacks: Any, optimizer: Any = None, rows: Any = ROWS, **options: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    made = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings | options),
        train_dataset=rows,
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )
    made.remove_callback(PrinterCallback)
    return made


class Rude(torch.optim.Optimizer):
    """Writes noise into every weight and keeps noise of it, whatever the gradients are."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                noise = torch.randn_like(parameter)
                self.state[parameter]["noise"] = noise
                parameter.data += group["lr"] * noise


OPTIMIZERS: dict[str, Any] = {
    "adamw_torch": {"optim": "adamw_torch"},
    "adamw_torch_fused": {"optim": "adamw_torch_fused"},
    "adafactor": {"optim": "adafactor"},
    "sgd with momentum": lambda model: torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9, weight_decay=0.1),
    "rmsprop": {"optim": "rmsprop"},
    "muon": lambda model: torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], 1e-2),
    "rude": lambda model: Rude(model.parameters()),
    # Below min_8bit_size it would keep its moments in float32.
    "adamw 8bit": lambda model: bitsandbytes().optim.AdamW8bit(model.parameters(), 1e-2, min_8bit_size=1),
}


def bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes")


@tiny.pairs_by_turns("name, precision", OPTIMIZERS, ["float32", "bfloat16 autocast"])
def test_zeros_stay_zero_in_every_step(tmp_path: Path, name: str, precision: str) -> None:
    # With accumulation, clipping and weight decay throughout.
    if "8bit" in name and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    model = sparse()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    watch = Watch(model)
    assert sum(int(removed.sum()) for removed in watch.removed.values()) == 11520  # half of the 21 matrices
    choice = OPTIMIZERS[name]
    options = choice if isinstance(choice, dict) else {"optimizer": choice(model)}
    callback = secateur.SparsityCallback()
    trainer(model, tmp_path, callback, watch, bf16="bfloat16" in precision, **options).train()
    assert watch.steps == STEPS
    assert callback.zeros == 11520
    assert (watch.moments > 0) == (name not in ("adafactor", "adamw 8bit"))  # theirs are factors, or whole numbers
    for key, value in model.state_dict().items():
        if key in watch.removed:
            moved = value != before[key]
            assert not (moved & watch.removed[key]).any()
            assert moved.sum() > 0.9 * (~watch.removed[key]).sum(), key  # and the others did learn


def test_without_the_callback_they_do_not(tmp_path: Path) -> None:
    model = sparse()
    removed = removed_of(model)
    trainer(model, tmp_path).train()
    parameters = dict(model.named_parameters())
    assert all(bool(parameters[name][where].any()) for name, where in removed.items())


def test_kept_weights_move_as_in_a_loop_by_hand(tmp_path: Path) -> None:
    # Gradients masked by hand before they are clipped, then torch's own AdamW; nothing of the package in it.
    model, reference = sparse(), sparse()
    removed = removed_of(reference)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    norms = []
    for step in range(STEPS):
        ids = ROWS.ids[2 * step : 2 * step + 2]
        reference(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in reference.named_parameters():
            if name in removed:
                parameter.grad[removed[name]] = 0
        norms.append(float(nn.utils.clip_grad_norm_(reference.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    made = trainer(
        model,
        tmp_path,
        secateur.SparsityCallback(),
        gradient_accumulation_steps=1,
        lr_scheduler_type="constant",
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
        train_sampling_strategy="sequential",
    )
    made.train()
    logged = [entry["grad_norm"] for entry in made.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=1e-5)  # clipping saw no gradient of a pruned weight
    others = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, others[name], rtol=1e-5, atol=1e-6)


def test_a_pattern_of_n_in_m_holds(tmp_path: Path) -> None:
    model = sparse(secateur.NM(2, 4))
    trainer(model, tmp_path, secateur.SparsityCallback()).train()
    assert {matrix.pattern for matrix in secateur.inspect(model).matrices} == {"2:4"}


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_transposed_and_fused_matrices(tmp_path: Path, name: str) -> None:
    model = sparse(name=name)
    before = secateur.inspect(model)
    assert before.sparsity == 0.5
    trainer(model.requires_grad_(), tmp_path, secateur.SparsityCallback()).train()
    after = secateur.inspect(model.eval())
    assert [matrix.zeros for matrix in after.matrices] == [matrix.zeros for matrix in before.matrices]


def test_resuming(tmp_path: Path) -> None:
    whole, parted = sparse(), sparse()
    trainer(whole, tmp_path / "whole", secateur.SparsityCallback()).train()
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(parted, tmp_path / "parted", secateur.SparsityCallback(), **options).train()
    fresh = sparse()
    watch = Watch(fresh)
    again = trainer(fresh, tmp_path / "parted", secateur.SparsityCallback(), watch, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "parted" / "checkpoint-2"))
    assert watch.steps == 2
    for name, parameter in fresh.named_parameters():
        torch.testing.assert_close(parameter, dict(whole.named_parameters())[name])


def test_moments_of_a_dense_run_do_not_come_back(tmp_path: Path) -> None:
    # A run that lost its zeros, resumed with weights pruned anew: the optimizer remembers moments of all weights.
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(sparse(), tmp_path, **options).train()
    checkpoint = tmp_path / "checkpoint-2"
    sparse().save_pretrained(checkpoint)
    fresh = sparse()
    watch = Watch(fresh)
    trainer(fresh, tmp_path, secateur.SparsityCallback(), watch, **options).train(
        resume_from_checkpoint=str(checkpoint)
    )
    assert watch.moments > 0


def test_a_callback_that_is_used_again_after_a_run_that_failed(tmp_path: Path) -> None:
    class Failure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    callback = secateur.SparsityCallback()
    with pytest.raises(KeyboardInterrupt):
        trainer(sparse(), tmp_path, callback, Failure()).train()
    model = sparse(secateur.NM(2, 4))
    watch = Watch(model)
    trainer(model, tmp_path, callback, watch).train()
    assert watch.steps == STEPS
    assert {matrix.pattern for matrix in secateur.inspect(model.eval()).matrices} == {"2:4"}


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_pieces_of_accelerate_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    # `accelerate launch` says it in its own state, and not in the Trainer's arguments.
    made = trainer(sparse(), tmp_path, secateur.SparsityCallback())
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType[kind])
    state = made.state
    with pytest.raises(ModelStructureError, match=f"SparsityCallback: {kind.lower()} keeps parameters in pieces"):
        made.callback_handler.on_train_begin(made.args, state, made.control)


# Which matrices


def test_behind_adapters_the_zeros_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "dense")
    secateur.prune(folder, method=secateur.magnitude(), output=tmp_path / "pruned")
    callback = secateur.SparsityCallback.from_checkpoint(tmp_path / "pruned")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    callback.attach(get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"), config))
    assert callback.zeros == 11520
    message = r"\.weight: 0 zeros of .* in the model, expected \d+ of .* as in .*pruned\. Load the model from there"
    with pytest.raises(PatternError, match=message):
        callback.attach(get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config))


def test_fused_experts_behind_adapters_are_found(tmp_path: Path) -> None:
    folder = tiny.save("mixtral", tmp_path / "dense")
    secateur.prune(folder, method=secateur.magnitude(), output=tmp_path / "pruned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    callback = secateur.SparsityCallback.from_checkpoint(tmp_path / "pruned")
    callback.attach(get_peft_model(model, config))
    assert callback.zeros == secateur.verify(tmp_path / "pruned").zeros > 0


def test_only_planned_matrices_count_with_a_checkpoint(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "dense")
    secateur.prune(folder, method=secateur.magnitude(), only=["*.q_proj"], output=tmp_path / "pruned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 0  # a zero by chance, of no plan
    everything, planned = secateur.SparsityCallback(), secateur.SparsityCallback.from_checkpoint(tmp_path / "pruned")
    for callback, zeros in ((everything, 3 * 512 + 1), (planned, 3 * 512)):
        callback.attach(model)
        assert callback.zeros == zeros
    everything._detach()
    trainer(model, tmp_path / "run", planned).train()
    assert model.model.layers[0].mlp.up_proj.weight[0, 0] != 0
    assert (model.model.layers[0].self_attn.q_proj.weight == 0).sum() == 512


def test_a_model_that_is_not_the_checkpoint(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "dense")
    secateur.prune(folder, method=secateur.magnitude(), output=tmp_path / "pruned")
    callback = secateur.SparsityCallback.from_checkpoint(tmp_path / "pruned")
    message = "down_proj.weight: 0 zeros of [32, 48] in the model, expected 768 of [32, 48] as in "
    with pytest.raises(PatternError, match=re.escape(message)):
        trainer(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "run", callback).train()
    with pytest.raises(PatternError, match="has no such matrix"):
        callback.attach(tiny.build("gpt2"))


def test_a_dense_model_has_nothing_to_keep(tmp_path: Path) -> None:
    with pytest.raises(PatternError, match="none of its 21 prunable matrices has a zero"):
        trainer(tiny.build("llama").requires_grad_(), tmp_path, secateur.SparsityCallback()).train()


def test_zeros_that_something_else_fills_are_found(tmp_path: Path) -> None:
    class Filler(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight[model.model.layers[1].mlp.up_proj.weight == 0] = 1.0

    message = r"model\.layers\.1\.mlp\.up_proj\.weight: 768 of 768 pruned weights are not zero any more\."
    with pytest.raises(PatternError, match=message):
        trainer(sparse(), tmp_path, secateur.SparsityCallback(), Filler(), max_steps=1).train()


def test_frozen_matrices_take_no_memory(tmp_path: Path) -> None:
    model = sparse()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    callback = secateur.SparsityCallback()
    callback.attach(model)
    assert callback.zeros == 11520
    assert callback._removed == {}
    trainer(model, tmp_path, callback).train()


def test_a_model_with_adapters(tmp_path: Path) -> None:
    # The zeros of lora_B are no pruned weights: they have to learn.
    model = sparse()
    with_adapters = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    callback = secateur.SparsityCallback()
    trainer(with_adapters, tmp_path, callback).train()
    assert callback.zeros == 11520
    learnt = [value for name, value in with_adapters.named_parameters() if "lora_B" in name]
    assert len(learnt) == 3
    assert all(bool((value != 0).all()) for value in learnt)


def test_parameters_in_pieces_are_refused(tmp_path: Path) -> None:
    made = trainer(sparse(), tmp_path)
    made.args.deepspeed = {"zero_optimization": {"stage": 3}}
    callback = secateur.SparsityCallback()
    with pytest.raises(ModelStructureError, match="deepspeed keeps parameters in pieces"):
        callback.on_train_begin(made.args, made.state, made.control, model=made.model)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = sparse()
    trainer(model, tmp_path, secateur.SparsityCallback()).train()
    model(input_ids=ROWS.ids[:2], labels=ROWS.ids[:2]).loss.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    assert bool(gradient[model.model.layers[0].self_attn.q_proj.weight == 0].any())  # no hook is left behind


def test_the_state_is_not_in_the_way_of_the_trainers(tmp_path: Path) -> None:
    trainer(sparse(), tmp_path, secateur.SparsityCallback(), save_strategy="steps", save_steps=2).train()
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


# Other trainers


def test_trainers_of_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    save_model(tmp_path / "dense")
    secateur.prune(
        tmp_path / "dense", method=secateur.magnitude(), pattern=secateur.NM(2, 4), output=tmp_path / "pruned"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pruned", pad_token="<s>", eos_token="<s>")
    before = {name: value.clone() for name, value in model.named_parameters()}
    watch = Watch(model)
    made = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=STEPS,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_dict({"text": ["The tree was cut back and bore more fruit."] * 40}),
        processing_class=tokenizer,
        callbacks=[secateur.SparsityCallback(), watch],
    )
    made.train()
    assert watch.steps == STEPS
    assert all(bool((value != before[name]).any()) for name, value in model.named_parameters() if name in watch.removed)
    assert {matrix.pattern for matrix in secateur.inspect(model.eval()).matrices} == {"2:4"}


def train_with_others(folder: Path) -> None:
    """What each of the processes of data-parallel training does, which leaves its weights in a file."""
    model = sparse(secateur.NM(2, 4))
    watch = Watch(model)
    trainer(model, folder, secateur.SparsityCallback(), watch).train()
    assert watch.steps == STEPS
    found = torch.cat([value.detach().flatten() for value in model.parameters()])
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    (folder / f"{rank}-{size}").write_bytes(found.numpy().tobytes())
    assert {matrix.pattern for matrix in secateur.inspect(model.eval()).matrices} == {"2:4"}


def assert_both_have_the_same_weights(folder: Path) -> None:
    first, second = (folder / f"{rank}-2" for rank in (0, 1))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow  # two interpreters; forks crash in torch's DDP
def test_data_parallel_training(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import pathlib, sys\nfrom test_sparsity_callback import train_with_others\n"
        "train_with_others(pathlib.Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
    }
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert_both_have_the_same_weights(tmp_path)
