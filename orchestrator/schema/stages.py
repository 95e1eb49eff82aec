"""The kinds of stage. Everything in a stage but its `resources` is its identity."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from orchestrator.schema.methods import (
    Bottleneck,
    Ia3,
    Lora,
    Method,
    PrefixTuning,
    PromptMethod,
    QuantizationByName,
    Subspace,
    WholeModelMethod,
)
from orchestrator.schema.strict import Schema, Sources, WeightedSources

SavedModule = Literal["embed_tokens", "lm_head"]
"""The modules outside the blocks that may be trained in full."""


OptimizerKind = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]


class VocabularyStage(Schema):
    """Extends the base tokenizer with pieces for the new language, and sizes the embeddings to it."""

    kind: Literal["vocabulary"]
    merge: Literal["reachable", "published", "none"] = "reachable"
    """reachable drops pieces that BPE can never produce and leaves the base language's ids alone;
    published reproduces Chinese-LLaMA's file to the byte; none keeps the base tokenizer."""
    pieces: PositiveInt = 20_000
    """Size of the SentencePiece model trained here for the new language."""
    character_coverage: float = Field(default=0.9995, gt=0, le=1)
    sentencepiece_model: str | None = None
    """A SentencePiece model to take instead of training one."""
    data: Sources | None = None
    """What the SentencePiece model is trained on; the recipe's `text` by default."""
    pad_token: str | None = "<pad>"
    """A piece to pad with, appended when the base tokenizer has none."""
    pad_to_multiple: PositiveInt = 64
    """The embedding matrices get a number of rows that this divides."""
    new_rows: Literal["mean_of_pieces", "mean", "normal"] = "mean_of_pieces"
    """What a new piece's row starts as: the mean over the pieces the base tokenizer would have used,
    the mean of all old rows, or the model's own random initialization."""


class Resources(Schema):
    """How a stage is computed. None of it changes what is learned, so none of it is fingerprinted."""

    micro_batch_size: PositiveInt = 4
    """Sequences that one device takes through forward and backward at once."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward: about a third more compute for much less memory."""


HeldOutName = Literal["validation", "instructions", "retention"]
"""What a recipe may hold out: `validation`, `validation_instructions` and `retention.text`."""


class KeepBest(Schema):
    """Leaves the state with the least held-out loss in place of the last one."""

    of: HeldOutName = "validation"
    """Whose loss counts."""
    every_steps: PositiveInt
    """How often it is measured; after the last step it is, too."""
    patience: PositiveInt | None = None
    """Ends the stage after so many measurements in a row that were no better than the best."""


class TrainStage(Schema):
    """What is learned. All but `resources` and `log_every_steps` is the stage's identity."""

    kind: Literal["train"]
    objective: Literal["next_token", "answers"]
    """next_token learns the recipe's `text`; answers learns the answers of its `instructions`."""
    data: WeightedSources | None = None
    """This stage's own sources, in place of the recipe's."""
    template: Literal["alpaca", "chat"] = "alpaca"
    """How an instruction is put to the model; chat uses the tokenizer's own chat template."""
    block_length: PositiveInt
    """Tokens in a sequence."""
    packing: bool = True
    """Several instructions share a sequence, each attending to itself alone; false gives each its own, and padding. Text
    fills its sequences in any case."""
    method: Method | None = None
    """How the blocks are adapted; nothing of them learns by default."""
    quantization: QuantizationByName | None = None
    """Of the base while this stage trains."""
    modules_to_save: tuple[SavedModule, ...] = ()
    """Modules trained in full."""
    new_rows: tuple[SavedModule, ...] = ()
    """Modules of which only the rows learn that the vocabulary stage added: a fraction of the gradients, optimizer state and
    adapter of the whole. The other rows stay what they are."""

    global_batch_size: PositiveInt
    """Sequences per optimizer step, over all workers; a packed one holds several instructions."""
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    """Passes over the data; the alternative to `steps`."""
    learning_rate: PositiveFloat
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps during which the learning rate rises linearly to its peak."""
    weight_decay: NonNegativeFloat = 0.0
    optimizer: OptimizerKind = "adamw"
    """8bit keeps each of Adam's moments in a byte (Dettmers et al. 2021); those of a paged one wait in the host's memory
    where a GPU has too little. Both are bitsandbytes'; on CPUs nothing is paged."""
    max_gradient_norm: PositiveFloat = 1.0

    keep_best: KeepBest | None = None
    """The last state stays by default."""

    log_every_steps: PositiveInt = 1
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _check(self) -> "TrainStage":
        if self.method is None and not self.modules_to_save and not self.new_rows:
            raise ValueError("nothing to train; give `method`, `modules_to_save` or `new_rows`")
        if isinstance(self.method, WholeModelMethod) and (self.modules_to_save or self.new_rows):
            raise ValueError(f"method: {self.method.kind} trains every weight; leave out modules_to_save and new_rows")
        if isinstance(self.method, Subspace) and self.resources.gradient_checkpointing:
            raise ValueError(
                "method: subspace computes each forward with weights of its own, which gradient_checkpointing would lose; "
                "set resources.gradient_checkpointing=false"
            )
        if isinstance(self.method, Bottleneck | PromptMethod) and (self.modules_to_save or self.new_rows):
            raise ValueError(
                f"method: {self.method.kind} leaves the model as it is, and its adapter holds nothing else; "
                "leave out modules_to_save and new_rows"
            )
        if isinstance(self.method, PromptMethod):
            self._check_prompts(self.method)
        if self.quantization and isinstance(self.method, WholeModelMethod):
            raise ValueError(
                "quantization: weights in a few bits cannot learn; leave it out, or choose another method than "
                f"{self.method.kind}"
            )
        if self.quantization and isinstance(self.method, Ia3):
            # PEFT 0.21 computes a scaled layer of a quantized base in fp32, and attention takes no two precisions.
            raise ValueError("quantization: ia3 does not go with it in PEFT; choose another method, or leave it out")
        if self.quantization and isinstance(self.method, Lora) and self.method.init == "pissa":
            raise ValueError("quantization: what pissa leaves of the weights would be rounded again; choose another init")
        if not self.quantization and isinstance(self.method, Lora) and self.method.init == "loftq":
            raise ValueError(
                "method.init: loftq begins with what quantization takes; give quantization: nf4, or choose another init"
            )
        if both := sorted(set(self.modules_to_save) & set(self.new_rows)):
            raise ValueError(f"{both[0]} is in modules_to_save and in new_rows; train all of its rows, or the new ones")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        if self.global_batch_size % self.resources.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size:,} is not divisible by "
                f"resources.micro_batch_size {self.resources.micro_batch_size:,}"
            )
        return self

    def _check_prompts(self, method: PromptMethod) -> None:
        if self.objective == "answers" and self.packing:
            raise ValueError(
                f"method: {method.kind} puts virtual tokens before a row, which must be one sample; set packing=false"
            )
        if isinstance(method, PrefixTuning) and self.resources.gradient_checkpointing:
            raise ValueError(
                "method: prefix_tuning hands keys and values to every layer, which gradient_checkpointing would lose; "
                "set resources.gradient_checkpointing=false"
            )


class MergeStage(Schema):
    """Makes what was learned so far part of the base, for stages whose method cannot share an adapter with it."""

    kind: Literal["merge"]
    max_shard_bytes: PositiveInt = 5_000_000_000


class EvaluationStage(Schema):
    """Measures the base, what each stage before it left, and the exported model, side by side."""

    kind: Literal["evaluate"]
    models: Literal["all", "last"] = "all"
    """All of them, or the last alone."""
    prompts: str | None = None
    """A text file with a prompt a line, which each model goes on with; the recipe's `evaluation.prompts` by default."""
    sample_tokens: NonNegativeInt = 64
    """Of each sample, at most; 0 writes none."""
    tasks: tuple[str, ...] = ()
    """Of EleutherAI's lm-evaluation-harness, such as ceval-valid, cmmlu or mmlu; needs the extra `evaluation`."""
    task_folder: str | None = None
    """Where tasks of your own are described, in the harness's YAML."""
    few_shot: NonNegativeInt | None = None
    """Examples before each question; the tasks' own number by default."""
    limit: PositiveInt | None = None
    """Questions of each task, at most."""


class ExportStage(Schema):
    """Leaves what was learned in forms that other tools load: one PEFT folder, and a merged model."""

    kind: Literal["export"]
    merged: bool = True
    """Also write base and adapter as one Hugging Face model."""
    max_shard_bytes: PositiveInt = 5_000_000_000
    verify_tokens: NonNegativeInt = 64
    """Tokens on which merged model and base with adapter are compared; 0 skips the comparison."""


Stage = Annotated[VocabularyStage | TrainStage | MergeStage | ExportStage | EvaluationStage, Field(discriminator="kind")]
