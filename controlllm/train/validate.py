"""What is looked at while training: loss on held-back rows, generated answers, and what of old skills is kept."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from controlllm.config import ValidationConfig
from controlllm.data.shelf import PackedRow
from controlllm.errors import UserError
from controlllm.train.distributed import World
from controlllm.train.generation import Generation
from controlllm.train.passes import Passes
from controlllm.train.retention import Retention


class Validation:
    """Made once, on every process, before any step is taken and any checkpoint loaded.

    forward: the model as it is trained, model: the one inside; forward(**batch, num_items_in_batch=1,
    measure_divergence=False) gives the sum of the losses as `cross_entropy`. rows: held back; retention: of old skills
    (`retention_rows`). beat: called before every pass. UserError where there is nothing to look at.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        model: Any,
        config: ValidationConfig,
        *,
        rows: Sequence[PackedRow],
        world: World,
        autocast: Callable[[], AbstractContextManager[Any]],
        micro_batch_size: int,
        tokenizer: Any = None,
        retention: Sequence[PackedRow] = (),
        beat: Callable[[], None] = lambda: None,
    ):
        self.config, self.rows = config, rows
        self.passes = Passes(forward, model, world=world, autocast=autocast, batch_size=micro_batch_size, beat=beat)
        if not rows and not (config.retention and retention):
            raise UserError(
                "validation: no rows are held back; raise pack.validation_fraction, or set validation to null"
            )
        if rows and not any(self.passes.batch(rows, k).targets for k in range(self.passes.batches(rows))):
            raise UserError("validation: the held-back rows have no token to predict; raise validation.rows")
        self.generation = Generation(self.passes, rows, config.generate, tokenizer) if config.generate else None
        self.retention = None
        if config.retention and retention:
            self.retention = Retention(self.passes, retention, positions=config.retention.positions)

    def run(self) -> dict[str, float]:
        """The same on every process, to the last digit, whatever their number.

        validation_loss (nats per target, without the divergence), validation_perplexity; rouge1, rouge2, rougeL,
        rougeLsum, bleu, generated_items; retention_loss, retention_kl: those that the recipe asks for.
        """
        metrics: dict[str, float] = {}
        others = [part for part in (self.generation, self.retention) if part]
        own = self.passes.rounds(self.passes.batches(self.rows))
        with self.passes.evaluating(own + sum(part.rounds for part in others)):
            if self.rows:
                loss = self.passes.mean_loss(self.rows)
                metrics |= {"validation_loss": loss, "validation_perplexity": perplexity(loss)}
            for part in others:
                metrics |= part.run()
        return metrics

    def samples(self) -> list[dict[str, str]]:
        """Prompt, reference and answer of every question of the last run."""
        return self.generation.samples if self.generation else []


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is too large for a number."""
    return math.exp(loss) if not loss > 709 else math.inf
