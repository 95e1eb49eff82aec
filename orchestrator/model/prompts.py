"""Virtual tokens before every sample: what is learned is what the model is told first, and none of its weights."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

NAME = "prompts"
"""Of the module, beside the parts of the model itself."""


class Prompts(nn.Module):
    """Virtual tokens as an encoder makes them: embeddings, or with `kv_shape` the keys and values of every layer."""

    def __init__(self, encoder: nn.Module, num_tokens: int, kv_shape: tuple[int, int, int] | None = None) -> None:
        """`kv_shape` is layers, heads and size of a head."""
        super().__init__()
        self.encoder, self.num_tokens, self._kv_shape = encoder, num_tokens, kv_shape
        self.is_left_out = False
        """While the base is measured by itself."""

    def virtual_tokens(self) -> Tensor:
        """[tokens, hidden] or, of keys and values, [tokens, 2 x layers x heads x size]."""
        return self.encoder(torch.arange(self.num_tokens, device=next(self.encoder.parameters()).device)[None])[0]

    def forward(self, decoder: Any, input_ids: Tensor) -> Tensor:
        """The decoder's last hidden states [m, n, hidden] of input_ids [m, n], each row behind the virtual tokens."""
        rows = len(input_ids)
        if self._kv_shape:
            cache = self._cache(rows)
            return decoder(input_ids=input_ids, past_key_values=cache, use_cache=True).last_hidden_state
        prompt = self.virtual_tokens().expand(rows, -1, -1)
        embeddings = torch.cat([prompt, decoder.embed_tokens(input_ids)], 1)
        return decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, self.num_tokens :]

    def _cache(self, rows: int) -> DynamicCache:
        """As PEFT lays it out: of each token keys and values of all layers in turns."""
        assert self._kv_shape
        layers, heads, size = self._kv_shape
        tokens = self.virtual_tokens().view(self.num_tokens, 2 * layers, heads, size).permute(1, 2, 0, 3)
        cache = DynamicCache()
        for layer in range(layers):
            keys, values = (tokens[2 * layer + part].expand(rows, -1, -1, -1) for part in (0, 1))
            cache.update(keys, values, layer)
        return cache
