"""Multi-token prediction (DeepSeek-AI 2024, §2.2): also learn the token after the next.

After the main model one more block sees, at position i, what the model made of tokens 1..i and
the embedding of token i + 1, and predicts token i + 2 with the same head. The main model learns
to plan ahead; decoding does not need the block, but can draft with it. Further blocks go on one
token each. Weight names and order are those of the official checkpoints.

B batch · T positions · D model
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.models.loss import IGNORE, causal_lm_loss
from minillm.models.norm import RMSNorm
from minillm.models.router import Route


class SharedHead(nn.Module):
    """The norm before the head; the head itself is the main model's."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(size, eps)


class Join(nn.Module):
    """What a block adds to a decoder layer: `eh_proj([enorm(embedding), hnorm(hidden)])`."""

    enorm: RMSNorm
    hnorm: RMSNorm
    eh_proj: nn.Linear
    shared_head: SharedHead

    def add_join(self, size: int, eps: float) -> None:
        """Create the weights, beside those of the decoder layer."""
        self.enorm, self.hnorm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.shared_head = SharedHead(size, eps)

    def join(self, hidden_BTD: Tensor, embeds_BTD: Tensor) -> Tensor:
        """Return the input of the decoder layer."""
        out_BTD: Tensor = self.eh_proj(
            torch.cat((self.enorm(embeds_BTD), self.hnorm(hidden_BTD)), dim=-1)
        )
        return out_BTD


def next_labels(labels_BT: Tensor, document_BT: Tensor | None) -> Tensor:
    """Move labels one token further; -100 where the token is of another document, or unseen.

    Args:
        labels_BT: Label of position i: the token at i + 1 + depth, or -100.
        document_BT: A number for each token's document, or None: one document a row.

    Returns:
        Label of position i: the token at i + 2 + depth, or -100.
    """
    moved_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE)
    # the token after a row's last input may be of another document: nobody can tell
    moved_BT = F.pad(moved_BT[:, :-2], (0, min(2, moved_BT.shape[1])), value=IGNORE)
    if document_BT is not None:
        for ahead in (1, 2):
            same_BT = document_BT[:, ahead:] == document_BT[:, :-ahead]
            same_BT = F.pad(same_BT, (0, moved_BT.shape[1] - same_BT.shape[1]))
            moved_BT = moved_BT.where(same_BT, IGNORE)
    return moved_BT


def mtp_losses(
    model: Any,
    layers: Sequence[Any],
    hidden_BTD: Tensor,
    embeds_BTD: Tensor,
    labels_BT: Tensor,
    document_BT: Tensor | None,
    routes: list[Route],
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of all blocks, over all depths, and its number of labels.

    Args:
        model: The causal LM: gives the head.
        layers: The blocks; each maps hidden states and embeddings to hidden states.
        hidden_BTD: The main model's normed output.
        embeds_BTD: Its input embeddings.
        labels_BT: Its labels: at position i the token at i + 1, or -100.
        document_BT: A number for each token's document, or None.
        routes: Takes what the blocks' routers did.
        **kwargs: For the decoder layer.
    """
    total, count = hidden_BTD.new_zeros((), dtype=torch.float32), labels_BT.new_zeros(())
    for layer in layers:
        # the last token of a document sees zeros, not the first of the next: it has no label, but
        # its experts are counted
        embeds_BTD = F.pad(embeds_BTD[:, 1:], (0, 0, 0, 1))
        if document_BT is not None:
            goes_on_BT = F.pad(document_BT[:, 1:] == document_BT[:, :-1], (0, 1))
            embeds_BTD = embeds_BTD * goes_on_BT.unsqueeze(-1)
        labels_BT = next_labels(labels_BT, document_BT)
        hidden_BTD, *route = layer(hidden_BTD, embeds_BTD, **kwargs)
        if route:
            routes.append(Route(layer.mlp.gate, *route))
        loss = causal_lm_loss(model, hidden_BTD, None, shift_labels=labels_BT, num_items_in_batch=1)
        assert loss is not None
        total, count = total + loss, count + (labels_BT != IGNORE).sum()
    return total, count
