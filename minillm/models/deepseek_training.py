"""What a DeepSeek-V3 learns from beside the next token, and how its experts are kept even.

B batch · T positions · D model · V vocabulary
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.models.base import MiniPreTrainedModel
from minillm.models.loss import IGNORE
from minillm.models.mtp import mtp_losses
from minillm.models.packing import document_positions, documents
from minillm.models.router import Route, TopkRouter, balance_loss, update_biases


class TrainingExtras(MiniPreTrainedModel):
    """Further losses of a causal LM with routers and multi-token prediction."""

    balance: Tensor
    mtp_loss: Tensor

    def add_meters(self) -> None:
        """Create the scalars that `metrics` shows."""
        self.register_buffer("balance", torch.zeros(()), persistent=False)
        self.register_buffer("mtp_loss", torch.zeros(()), persistent=False)

    def extra_loss(
        self,
        hidden_BTD: Tensor,
        embeds_BTD: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        labels: Tensor | None,
        routes: list[Route],
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the weighted losses of the further tokens and of the experts' balance.

        Both are sums over tokens divided by the same number of labels as the cross entropy, so
        that neither packing nor cutting a step into micro-batches changes their gradients.
        """
        if shift_labels is None:
            assert labels is not None
            shift_labels = F.pad(labels, (0, 1), value=IGNORE)[..., 1:]
        num = num_items_in_batch
        if num is None:
            num = (shift_labels != IGNORE).sum().clamp(min=1)
        cu_seq_lens = kwargs.get("cu_seq_lens_q")
        starts = position_ids
        if cu_seq_lens is not None:
            starts = document_positions(cu_seq_lens, *hidden_BTD.shape[:2])
        document_BT = None if starts is None else documents(starts).expand(hidden_BTD.shape[:2])

        model, extra = self.model, hidden_BTD.new_zeros((), dtype=torch.float32)
        config: Any = self.config
        blocks = model.layers[config.num_hidden_layers :]
        if len(blocks) and config.mtp_loss_weight:
            placed = model.place(embeds_BTD, attention_mask, position_ids, cu_seq_lens=cu_seq_lens)
            total, count = mtp_losses(
                self, blocks, hidden_BTD, embeds_BTD, shift_labels, document_BT, routes,
                **(kwargs | placed),
            )  # fmt: skip
            extra = extra + total * (config.mtp_loss_weight / len(blocks)) / num
            _show(self.mtp_loss, total / count.clamp(min=1))
        if routes:
            valid_BT = torch.ones_like(shift_labels, dtype=torch.bool)
            if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
                valid_BT = attention_mask[:, -valid_BT.shape[1] :].bool()
            total = balance_loss(routes, valid_BT, document_BT, config.num_experts_per_tok)
            extra = extra + total * config.aux_loss_alpha / num
            _show(self.balance, total / (valid_BT.sum().clamp(min=1) * len(routes)))
        return extra

    @property
    def gates(self) -> list[TopkRouter]:
        """Routers, in the order of the layers."""
        return [module for module in self.modules() if isinstance(module, TopkRouter)]

    def extra_flops(self, seq_len: int) -> dict[str, float]:
        """FLOPs of a token in training for the blocks that predict further tokens, with the head.

        As `flop_parts` counts them for the layers before.
        """
        config: Any = self.config
        idle = 1 - config.num_experts_per_tok / config.n_routed_experts
        total = 0.0
        for block in self.model.layers[config.num_hidden_layers :]:
            count = config.vocab_size * config.hidden_size
            count += sum(p.numel() for p in block.parameters())
            if isinstance(experts := getattr(block.mlp, "experts", None), nn.Module):
                count -= int(idle * sum(p.numel() for p in experts.parameters()))
            both = config.qk_head_dim + config.v_head_dim
            total += 6.0 * count + 6.0 * config.num_attention_heads * both * seq_len
        return {"further tokens": total} if total else {}

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Balance loss of a token (1: even), loss of further tokens, and the experts' load.

        The load of each expert of a layer is in multiples of the even one.
        """
        values = {"sequence_aux_loss": self.balance}
        if self.config.num_mtp_layers:
            values["mtp_loss"] = self.mtp_loss
        for name, module in self.named_modules():
            if isinstance(module, TopkRouter):
                layer = name.split(".")[-3]
                values[f"expert_load/layer_{layer}"] = module.load * len(module.load)
        return values

    def update_router_bias(self) -> None:
        """Move the routers' biases towards an even load, by the tokens since the last call."""
        update_biases(self.gates, self.config.router_bias_update_speed)

    def official_state(self) -> dict[str, Tensor]:
        """Return the weights without the blocks for further tokens."""
        first = self.config.num_hidden_layers
        blocks = tuple(
            f"model.layers.{n}." for n in range(first, first + self.config.num_mtp_layers)
        )
        return {k: v for k, v in self.state_dict().items() if not k.startswith(blocks or ("\0",))}


@torch.no_grad()
def _show(meter: Tensor, value: Tensor) -> None:
    meter.copy_(value)
