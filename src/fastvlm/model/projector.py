"""From what the vision encoder sees to what the language model reads."""

from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.config import ProjectorConfig


class Projector(nn.Module):
    """Two linear layers with a GELU between them (`mlp2x_gelu` in Apple's checkpoints)."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.in_dim, config.out_dim)
        self.fc2 = nn.Linear(config.out_dim, config.out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """`(P, N, C)` image features to `(P, N, D)` image embeddings."""
        return self.fc2(F.gelu(self.fc1(features)))
