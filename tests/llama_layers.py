"""What the linear layers of a small LLaMA are called."""

BLOCKS = 3
PARTS = {"mlp": ("down_proj", "gate_proj", "up_proj"), "self_attn": ("k_proj", "o_proj", "q_proj", "v_proj")}
LAYERS = tuple(
    f"model.layers.{number}.{part}.{name}" for number in range(BLOCKS) for part, names in PARTS.items() for name in names
)
