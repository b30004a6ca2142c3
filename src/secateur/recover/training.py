"""transformers' Trainer as recovery uses it: a budget in steps or minutes, a loss that stays finite, distillation."""

import ast
import math
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback

from secateur.calibration.windows import Windows
from secateur.errors import CheckpointError, NumericalError, PatternError
from secateur.evaluate.perplexity import exponential
from secateur.recover.settings import RecoverSettings

FOREVER = 1_000_000_000  # steps; the clock stops a run in minutes long before
NOMINAL_STEPS = 1000  # of the schedule of a run in minutes, which is read by the share of time spent


class Rows(Dataset[dict[str, Tensor]]):
    """Windows as a language model's inputs and labels. Padding follows the tokens, and no label counts there."""

    def __init__(self, windows: Windows) -> None:
        self.ids, self.mask = windows.input_ids, windows.attention_mask

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # Exact: nothing predicts the first token. A Trainer divides by the labels that count, and would count it for
        # models of which it does not know that they shift them.
        labels = self.ids[index].clone()
        labels[0] = -100
        if self.mask is None:
            return {"input_ids": self.ids[index], "labels": labels}
        labels[~self.mask[index]] = -100
        return {"input_ids": self.ids[index], "labels": labels, "attention_mask": self.mask[index].long()}


class Budget(TrainerCallback):
    """The clock of a run: how much of the budget is spent, when to evaluate, and when to stop."""

    def __init__(self, settings: RecoverSettings) -> None:
        self.settings = settings
        self.seconds_before = 0.0  # of the run that is resumed
        self.share = 0.0
        self._started = time.monotonic()
        self._evaluated = 0
        self._loss: float | None = None
        self._perplexity: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds spent training, those before an interruption included."""
        return self.seconds_before + time.monotonic() - self._started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock where a resumed run had stopped it."""
        self.seconds_before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self._started = time.monotonic()
        self._spend(state)
        self._evaluated = int(10 * self.share)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop a run that is limited by minutes in time, and evaluate it after each tenth of them."""
        self._spend(state)
        if self.settings.minutes is not None:
            tenth = int(10 * self.share)
            control.should_training_stop |= self.share >= 1
            if tenth > self._evaluated or control.should_training_stop:
                control.should_evaluate = control.should_save = control.should_log = True
                self._evaluated = tenth
        self._report(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Remember the latest loss."""
        self._loss = (logs or {}).get("loss", self._loss)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Stop when the held-out loss is not finite; this comes before anything is saved."""
        nats = (metrics or {}).get("eval_loss")
        if nats is not None:
            require_finite(nats, "held-out loss", state.global_step, args, state.best_model_checkpoint)
            self._perplexity = exponential(nats)
            self._report(state)

    def _report(self, state: Any) -> None:
        """The bar counts steps, or seconds where the clock decides."""
        parts = [] if self._loss is None else [f"loss {self._loss:.3f}"]
        parts += [] if self._perplexity is None else [f"held-out perplexity {self._perplexity:.3f}"]
        done, total = state.global_step, self.settings.total_steps
        if total is None:
            total = round(60 * (self.settings.minutes or 0))
            done, parts = round(self.share * total), [f"step {done}", *parts]
        self.settings.tell("training", done, total, ", ".join(parts))

    def _spend(self, state: Any) -> None:
        if self.settings.minutes is not None:
            self.share = min(1.0, self.seconds / (60 * self.settings.minutes))
        elif steps := self.settings.total_steps:
            self.share = min(1.0, state.global_step / steps)


def require_finite(loss: float, what: str, step: int, args: Any, best: str | None) -> None:
    """Raise `NumericalError` that says where the last good checkpoint is when a loss is not finite."""
    if math.isfinite(loss):
        return
    last = last_checkpoint(Path(args.output_dir))
    if last is None:
        advice = "No checkpoint had been saved yet. Start again with a lower --lr"
    else:
        better = "" if best is None or Path(best) == last else f", the best {best}"
        advice = f"The last good checkpoint is {last}{better}. Go on from there with --resume and a lower --lr"
    raise NumericalError(
        f"step {step}: the {what} is {loss}: training diverged. {advice} (it was {args.learning_rate:g})."
    )


def own_optimizer(settings: RecoverSettings) -> tuple[Any, dict[str, Any]] | None:
    """The class of an optimizer `module:Class` and its arguments, written as `momentum=0.9,nesterov=True`.

    None for one that the Trainer knows by name. Raises `PatternError` where there is no such class, and for arguments
    of either kind that are not written like that.
    """
    text = settings.optimizer_args
    try:
        call: Any = ast.parse(f"f({text or ''})", mode="eval").body
        given = {
            keyword.arg: keyword.value.id if isinstance(keyword.value, ast.Name) else ast.literal_eval(keyword.value)
            for keyword in call.keywords
        }
        if call.args or None in given:  # **given
            raise ValueError
    except (SyntaxError, ValueError):
        raise PatternError(
            f'--optimizer-args "{text}": expected name=value with commas between, such as momentum=0.9,nesterov=True.'
        ) from None
    module, own, attribute = settings.optimizer.partition(":")
    if not own:
        return None
    try:
        return getattr(import_module(module), attribute), {"lr": settings.lr, **given}
    except (ImportError, AttributeError, ValueError) as error:
        raise PatternError(
            f'--optimizer "{settings.optimizer}": {error}. Give a name of the Trainer\'s, or module:Class.'
        ) from None


def last_checkpoint(folder: Path) -> Path | None:
    """The latest complete checkpoint of a Trainer in a folder."""
    complete = sorted(
        (path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    return complete[-1] if complete else None


class RecoveryTrainer(Trainer):
    """A Trainer whose schedule may go by the clock, whose loss must be finite, and with a dense model to learn from."""

    def __init__(self, settings: RecoverSettings, dense: nn.Module | None, **options: Any) -> None:
        super().__init__(optimizer_cls_and_kwargs=own_optimizer(settings), **options)
        self.settings = settings
        self.budget = Budget(settings)
        self.dense = dense
        self.remove_callback(PrinterCallback)
        self.add_callback(self.budget)
        if settings.patience is not None:
            self.add_callback(EarlyStoppingCallback(settings.patience))

    def record(self) -> dict[str, Any]:
        """What the record of a recovery says of the training; its curve has a point wherever a loss was measured."""
        points: dict[float, dict[str, Any]] = {}
        for entry in self.state.log_history:
            nats = entry.get("eval_loss")
            perplexity = None if nats is None or nats >= 700 else math.exp(nats)
            point = {"loss": entry.get("loss"), "perplexity": perplexity}
            found = {key: value for key, value in point.items() if value is not None}
            if found:
                held = points.setdefault(entry["step"], {"step": entry["step"], "loss": None, "perplexity": None})
                held |= {"seconds": entry.get("seconds"), **found}
        steps = self.state.global_step
        windows = steps * self.settings.batch_size * self.settings.accumulation
        return {
            "steps": steps,
            "best_step": self.state.best_global_step,
            "tokens": windows * self.settings.length,
            "seconds": self.budget.seconds,
            "curve": [points[step] for step in sorted(points)],
        }

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule asked for; by the share of time spent where the run is in minutes."""
        if self.settings.minutes is None:
            return super().create_scheduler(num_training_steps, optimizer)
        nominal = get_scheduler(
            self.args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=1.0),
            num_warmup_steps=self.args.get_warmup_steps(NOMINAL_STEPS),
            num_training_steps=NOMINAL_STEPS,
        )
        if not hasattr(nominal, "lr_lambdas"):
            raise PatternError(
                f"--schedule {self.settings.schedule}: cannot go by the clock. With --minutes use linear, cosine or "
                "constant."
            )
        factor = nominal.lr_lambdas[0]
        own: Any = optimizer or self.optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            own, lambda step: factor(int(NOMINAL_STEPS * self.budget.share))
        )
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy; while training with a dense model, mixed with the divergence from its predictions.

        ``(1 - w) CE + w T² KL(dense || model)`` per token, with both distributions at temperature T.

        Source: Hinton et al. (arXiv 1503.02531), section 2.
        """
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.dense is not None and model.training:
            seen = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                target = self.dense(**seen).logits[:, :-1]
            heat, own = self.settings.temperature, outputs.logits[:, :-1]
            if "attention_mask" in seen:
                counted = seen["attention_mask"][:, 1:].bool()
                target, own = target[counted].unsqueeze(0), own[counted].unsqueeze(0)
            p = (target.float() / heat).log_softmax(-1)
            q = (own.float() / heat).log_softmax(-1)
            divergence = nn.functional.kl_div(q, p, reduction="sum", log_target=True) * heat**2
            tokens = q.shape[0] * q.shape[1] if num_items_in_batch is None else num_items_in_batch
            weight = self.settings.distill_weight
            loss = (1 - weight) * loss + weight * divergence / tokens
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward; raises `NumericalError` when the loss is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        state = self.state
        require_finite(float(loss), "loss", state.global_step + 1, self.args, state.best_model_checkpoint)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the seconds spent."""
        super().log({**logs, "seconds": self.budget.seconds}, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # A Trainer loads its checkpoints by the names of parameters. Those of the checkpoint format may differ.
        model: Any = self.model
        if hasattr(model, "peft_config"):
            super()._save(output_dir, state_dict)
        else:
            model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # A run that is resumed with another learning rate is to use it, from its first step on.
        scheduler: Any = self.lr_scheduler
        if checkpoint is not None and hasattr(scheduler, "base_lrs"):
            optimizer: Any = self.optimizer
            for group in optimizer.param_groups:
                group["lr"] *= self.args.learning_rate / group["initial_lr"]
                group["initial_lr"] = self.args.learning_rate
            scheduler.base_lrs = [self.args.learning_rate] * len(scheduler.base_lrs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        super()._issue_warnings_after_load(load_result)
        if load_result.unexpected_keys:
            raise CheckpointError(
                f"{self.args.output_dir}: a checkpoint holds {load_result.unexpected_keys[0]}, which the model has not."
            )


def arguments(
    settings: RecoverSettings, folder: Path, device: torch.device, computing: torch.dtype
) -> TrainingArguments:
    """The Trainer's arguments. Raises `CheckpointError` for an optimizer or schedule that it does not know."""
    own = own_optimizer(settings)
    steps = settings.total_steps
    every = settings.eval_every or (max(1, math.ceil(steps / 10)) if steps else FOREVER)
    known = TrainingArguments.__dataclass_fields__
    checkpointing: Any = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    try:
        made = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps or FOREVER,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            learning_rate=settings.lr,
            lr_scheduler_type=settings.schedule,
            warmup_steps=settings.warmup,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.clip,
            optim="adamw_torch" if own else settings.optimizer,
            optim_args=settings.optimizer_args,
            seed=settings.seed,
            bf16=computing == torch.bfloat16,
            use_cpu=device.type == "cpu",
            eval_strategy="steps",
            eval_steps=every,
            save_steps=every,
            save_total_limit=1,  # beside the best one
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            prediction_loss_only=True,
            logging_steps=max(1, (steps or NOMINAL_STEPS) // 100),
            logging_first_step=True,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=device.type == "cuda",
            **{checkpointing: settings.gradient_checkpointing},  # type: ignore[arg-type]
        )
    except (ValueError, ImportError) as error:
        raise CheckpointError(f"transformers' Trainer refuses these settings: {' '.join(str(error).split())}") from None
    # With several GPUs and one process a Trainer would take all of them, by copies of the model that share no gradient
    # hooks.
    made._n_gpu = min(made.n_gpu, 1)
    return made
