"""What is measured of a model while its stage trains: the loss on what is held out, and what it makes of a few prompts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.data.batches import MicroBatch, evaluation_batches
from orchestrator.data.rows import PreparedRows
from orchestrator.data.templates import prompt_ids
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.engine import Engine
from orchestrator.model.loss import held_out_numbers
from orchestrator.model.writing import go_on
from orchestrator.stages.assignment import TrainAssignment
from orchestrator.train.link import Link
from orchestrator.train.loop import Progress

HeldOutNumbers = dict[str, dict[str, float]]
"""Loss, perplexity, bits per character and per byte of each held-out text, by its name."""


@dataclass(frozen=True)
class Measuring:
    """Of one rank; all must call its methods together."""

    assignment: TrainAssignment
    link: Link
    engine: Engine
    rank: int
    num_workers: int

    def row(self, progress: Progress) -> dict[str, Any]:
        """Numbers and samples, which count to the time of the next step as a part of their own."""
        with self.engine.counted("evaluation"):
            return {"held_out": self.held_out(progress), "samples": self.samples(progress)}

    def held_out(self, progress: Progress) -> HeldOutNumbers:
        """Of each text that is held out."""
        found = {}
        for text in self.assignment.held_out:
            rows = PreparedRows.open(text.rows)
            batches = evaluation_batches(rows, self.assignment.micro_batch_size, self.rank, self.num_workers)
            nats = self.engine.evaluate(self._beating(batches, progress))
            summary = rows.summary
            found[text.name] = held_out_numbers(nats, summary.targets, summary.characters, summary.text_bytes)
        return found

    def samples(self, progress: Progress) -> list[dict[str, str]]:
        """What the model makes of each of the recipe's prompts; none where nothing is measured in between."""
        assignment, wanted = self.assignment, self.assignment.evaluation
        if wanted.every_steps is None or not wanted.sample_tokens:
            return []
        tokenizer = load_tokenizer(assignment.tokenizer)
        template = assignment.stage.template if assignment.stage.objective == "answers" else "plain"
        found = []
        for prompt in wanted.prompts:
            self.link.beat(progress.step, "evaluating")
            ids = prompt_ids(tokenizer, template, prompt)
            written = go_on(self.engine.next_logits, ids, wanted.sample_tokens, tokenizer.eos_token_id)
            found.append({"prompt": prompt, "text": str(tokenizer.decode(written, skip_special_tokens=True))})
        return found

    def _beating(self, batches: Iterable[MicroBatch], progress: Progress) -> Iterator[MicroBatch]:
        for batch in batches:
            self.link.beat(progress.step, "evaluating")
            yield batch
