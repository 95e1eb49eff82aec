"""How PEFT calls what it writes: a key for each parameter."""

ADAPTER = "default"
"""The name under which PEFT keeps the one adapter of a model."""
KEY_PREFIX = "base_model.model."
ROWS_NAME = "token_adapter.trainable_tokens_delta"
"""How PEFT calls the rows of some tokens; it holds their values, not differences."""
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
SCALES = "ia3_l"


def adapter_key(parameter: str) -> str:
    """The key of a model's parameter; a layer that is wrapped has that of the plain one."""
    name = f"{parameter}.".replace(f".{ADAPTER}.", ".").replace(".base_layer.", ".").removesuffix(".")
    return KEY_PREFIX + name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def rows_key(module: str) -> str:
    """Of a table's new rows."""
    return f"{KEY_PREFIX}{module}.{ROWS_NAME}"


def plain_key(key: str) -> str:
    """As `adapter_key` says it; PEFT's own names tell which layers are wrapped."""
    return key.replace(".base_layer.", ".")


def adapted_layer(name: str) -> str | None:
    """The layer that a parameter or key of an adapter belongs to; None for one that belongs to no factor or scale."""
    parts = name.split(".")
    return next((".".join(parts[:place]) for place, part in enumerate(parts) if part in (*FACTORS, SCALES)), None)
