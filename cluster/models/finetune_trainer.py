"""transformers' Trainer with frozen lower layers and a loss that preserves the embeddings.

A copy of the untrained upper layers computes the base's embeddings, to which the trained ones are
held close. It starts from the frozen layers' output, so these run only once per batch, which makes
training on two cores fast. Works with any stack of equal layers. Loads torch.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from cluster.cpu import has_native_bfloat16
from cluster.errors import ConfigError
from cluster.models.finetune_data import FinetuneOptions
from cluster.models.store import Progress

WARMUP = 0.06  # share of the steps, as in RoBERTa's fine-tuning (arXiv:1907.11692, table 10)
WEIGHT_DECAY = 0.01
TEMPERATURE = 2.0  # of the teacher's scores, as in DistilBERT (arXiv:1910.01108)


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """Parts of a network with different learning rates."""

    frozen: list[nn.Module]
    """Embeddings and lower layers: no gradients, no dropout."""
    tuned: nn.ModuleList
    """Upper layers."""
    head: list[nn.Parameter]
    """Parameters after the layers; they are new and learn faster."""


def layer_stack(network: Any) -> nn.ModuleList:
    """Return the network's stack of equal layers.

    Raises:
        ConfigError: it has none.
    """
    base, count = network.base_model, network.config.num_hidden_layers
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError(
        f"{type(base).__name__} cannot be fine-tuned: it has no stack of {count} layers"
    )


def freeze_layers(network: Any, num_frozen: int) -> LayerGroups:
    """Freeze the embeddings and the lowest ``num_frozen`` layers of a network.

    Raises:
        ConfigError: the network has no stack of layers, or no layer would remain to train.
    """
    base, count = network.base_model, network.config.num_hidden_layers
    layers = layer_stack(network)
    if num_frozen >= count:
        raise ConfigError(
            f"frozen_layers is {num_frozen}, but the encoder has {count} layers; one must remain"
        )
    frozen = [getattr(base, "embeddings", base.get_input_embeddings()), *layers[:num_frozen]]
    for module in frozen:
        module.requires_grad_(False)
    tuned = layers[num_frozen:]
    inside = {id(p) for p in tuned.parameters()}
    head = [p for p in network.parameters() if p.requires_grad and id(p) not in inside]
    return LayerGroups(frozen, tuned, head)


def mixed_precision(device: str, *, enabled: bool) -> torch.autocast:
    """Compute matrix products in bfloat16 within the block, if the CPU does so natively."""
    return torch.autocast(device, torch.bfloat16, enabled=enabled and has_native_bfloat16())


class EmbeddingAnchor:
    """Copy of the trained layers in their initial state, to compare embeddings."""

    def __init__(self, tuned: nn.ModuleList) -> None:
        self._reference = copy.deepcopy(tuned).eval().requires_grad_(False)
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._output: Any = None
        # Records the inputs and the output of the layers that will be trained.
        tuned[0].register_forward_pre_hook(self._record_inputs, with_kwargs=True)
        tuned[-1].register_forward_hook(self._record_output)

    def _record_inputs(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs = args, kwargs

    def _record_output(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._output = _hidden(output)

    def similarity(self, mask: Tensor) -> Tensor:
        """Return the cosine similarity of the last batch's embeddings to the base's, [texts]."""
        (hidden, *others), kwargs = self._inputs
        with torch.no_grad():
            for layer in self._reference:
                hidden = _hidden(layer(hidden, *others, **kwargs))
        return functional.cosine_similarity(_mean(self._output, mask), _mean(hidden, mask))


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def distillation_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the divergence from a teacher's softened scores (Hinton et al., arXiv:1503.02531).

    Args:
        logits: Logits of the student, [texts, labels].
        wanted: Logits of the teacher, [texts, labels].
    """
    student = functional.log_softmax(logits.float() / TEMPERATURE, -1)
    teacher = functional.log_softmax(wanted.float() / TEMPERATURE, -1)
    divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return divergence * TEMPERATURE**2


class FinetuneTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """Trainer created by ``make_trainer``; ``anchor`` may be set before ``train``."""

    loss_is_scaled_for_ga = False
    parts: LayerGroups
    anchor: EmbeddingAnchor | None = None
    teacher: nn.Module | None = None
    """Network whose scores are imitated (``distillation_loss``)."""
    keep_embeddings: float = 0.0
    anchor_steps: int = 1
    dropout: bool = True
    bfloat16: bool = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the model's loss, with the terms of the teacher and the anchor if set."""
        # The Trainer enables dropout everywhere at each step.
        for module in self.parts.frozen if self.dropout else [model]:
            module.eval()
        mask = inputs["attention_mask"]
        with mixed_precision(mask.device.type, enabled=self.bfloat16):
            outputs = model(**inputs)
            loss = outputs.loss
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = self.teacher(**inputs).logits
                loss = (loss + distillation_loss(outputs.logits, wanted)) / 2
            if self.anchor is not None and self.state.global_step % self.anchor_steps == 0:
                drift = 1 - self.anchor.similarity(mask).mean()
                loss = loss + self.keep_embeddings * self.anchor_steps * drift
        return (loss, outputs) if return_outputs else loss


class ProgressCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Reports every step and every epoch to ``progress``."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        epoch = min(int(state.epoch) + 1, state.num_train_epochs)
        message = f"training, epoch {epoch} of {state.num_train_epochs}"
        self._progress(message, state.global_step / state.max_steps)

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        loss, epoch = others["metrics"]["eval_loss"], round(state.epoch)
        self._progress(f"epoch {epoch}: validation loss {loss:.3f}", None)


def make_trainer(
    network: Any,
    parts: LayerGroups,
    data: tuple[Sequence[Any], Sequence[Any]],
    collator: Any,
    options: FinetuneOptions,
    scratch: str,
) -> FinetuneTrainer:
    """Create a trainer on (train, validation) examples; ``scratch`` is for checkpoints."""
    train, validation = data
    stops_early = bool(options.patience and validation)
    each = "epoch" if stops_early else "no"
    arguments = TrainingArguments(
        output_dir=scratch,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=2 * options.batch_size,
        warmup_steps=WARMUP,
        train_sampling_strategy="group_by_length",
        seed=options.seed,
        eval_strategy=each,
        save_strategy=each,
        save_only_model=True,
        save_total_limit=1,
        load_best_model_at_end=stops_early,
        metric_for_best_model="loss",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    groups = [
        {"params": list(parts.tuned.parameters()), "lr": options.learning_rate},
        {"params": parts.head, "lr": options.head_learning_rate},
    ]
    trainer = FinetuneTrainer(
        model=network,
        args=arguments,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=validation or None,
        optimizers=(torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True), None),
        callbacks=[EarlyStoppingCallback(options.patience)] if stops_early else [],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.parts, trainer.keep_embeddings = parts, options.keep_embeddings
    trainer.anchor_steps = options.anchor_steps
    trainer.dropout, trainer.bfloat16 = options.dropout, options.bfloat16
    return trainer
