"""The hidden layer between two attentions."""

from torch import Tensor, nn

from zoo.layers.linear import Linear


class Mlp(nn.Module):
    """Two linear layers around an exact GELU, (..., embed_dim) -> same.

    Args:
        embed_dim: width in and out.
        hidden_dim: width between.
    """

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(embed_dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.fc1(tokens, gelu=True))
