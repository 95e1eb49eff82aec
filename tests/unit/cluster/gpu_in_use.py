"""A module whose import begins to use the GPU, as far as one can see without one."""

import torch

torch.cuda._initialized = True
