"""Where the numbers of a small Llama, or of its EAGLE-3 head, lie in a wide one.

The wide model computes the small one's function (no approximation but rounding):

* **Residual stream.** The small model's h channels come first, the others are zero. RMSNorm
  then divides by an rms that is sqrt(h/H) times as large, so its weights are scaled by
  sqrt(h/H) and eps by h/H (576 to 4096: 3/8 and 9/64, exact numbers).
* **Random numbers that cancel.** The query heads and the channels of the MLP come in pairs of
  neighbours that compute the same value, since their rows of q, gate and up are the same. A
  pair that stands for a head or channel of the small model has half of its weights in both
  columns of o_proj or down_proj. Everywhere else the two columns are r and -r, r random. So
  neither matrix holds a zero, an added layer contributes nothing, and the zero channels stay
  zero, up to the rounding of the sum. Neighbours lie in one tile of any matrix product, where
  float32 adds them up whatever dtype the product's splits are reduced in.
* **Columns that read zero channels** are random.
* **Rotary embedding.** Pair i of a head turns with theta^(-2i/d), which in a head of D = m d
  dimensions is pair m i: dimension i goes to m i and i + d/2 to D/2 + m i. The free
  dimensions are zero in k. Scores are divided by sqrt(D), not sqrt(d): q is scaled by sqrt(m).
* **Groups.** A key-value head serves half as many different query heads as it has; the small
  model's is repeated as often as its query heads need.

Zero are only the embedding's free columns, k's free dimensions and, in a head, the rows of
``fc`` for zero channels where they read others.

In bfloat16 the factors 3/8 and sqrt(2) round the norms and q once more (576 to 4096).

Shape suffixes: H wide and h source hidden size, S blocks of H or h channels side by side,
P pairs, N query heads, K key-value heads, D wide and d source head dimension, I wide and i
source channels of the MLP, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_eagle3.bench.llama_shape import LlamaShape, check_fit

_NORMS = ("input_layernorm", "post_attention_layernorm", "hidden_norm", "norm", "fc_norm")
_UNCHANGED = ("d2t", "t2d")


@dataclass(frozen=True)
class Noise:
    """Normal random numbers, made where and in the dtype in which they are needed."""

    generator: torch.Generator
    dtype: torch.dtype
    std: float

    def draw(self, *sizes: int) -> torch.Tensor:
        """A tensor of these sizes."""
        empty = torch.empty(sizes, dtype=self.dtype, device=self.generator.device)
        return empty.normal_(0, self.std, generator=self.generator)


class Layout:
    """The wide form of every tensor of a source."""

    def __init__(self, source: LlamaShape, wide: LlamaShape) -> None:
        """Plan the places.

        Raises:
            ValueError: the source does not fit into ``wide``.
        """
        check_fit(source, wide)
        self.source, self.wide = source, wide
        group, room = source.group, wide.group // 2
        self._kv_copies = source.kv_copies(wide)
        self._pairs = torch.tensor(
            [
                (head // group * self._kv_copies + head % group // room) * room
                + head % group % room
                for head in range(source.num_heads)
            ]
        )
        low = torch.arange(source.head_dim // 2) * (wide.head_dim // source.head_dim)
        self._rotary_dims = torch.cat((low, low + wide.head_dim // 2))
        free = torch.ones(wide.head_dim, dtype=torch.bool)
        free[self._rotary_dims] = False
        self._free_dims = free.nonzero()[:, 0]

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """A source's config with the wide sizes."""
        ratio = self.source.hidden_size / self.wide.hidden_size
        return config | {
            "hidden_size": self.wide.hidden_size,
            "intermediate_size": self.wide.intermediate_size,
            "num_hidden_layers": self.wide.num_layers,
            "num_attention_heads": self.wide.num_heads,
            "num_key_value_heads": self.wide.num_kv_heads,
            "head_dim": self.wide.head_dim,
            "rms_norm_eps": config["rms_norm_eps"] * ratio,
        }

    def check_names(self, names: Iterable[str]) -> None:
        """Check that :meth:`widen` knows these tensors.

        Raises:
            ValueError: it does not know one.
        """
        unknown = [n for n in names if n not in _UNCHANGED and self._builder(n) is None]
        if unknown:
            raise ValueError(
                f"no rule to widen {', '.join(unknown[:3])}: only a Llama without biases, and an "
                "EAGLE-3 head of one layer as `vllm-eagle3 convert-head` writes it, can be widened"
            )

    def widen(
        self, name: str, weight: torch.Tensor, noise: Noise, *, added: bool = False
    ) -> torch.Tensor:
        """The wide form of one tensor.

        Args:
            name: as in the checkpoint.
            weight: float32, on the noise's device.
            noise: for what the function leaves free.
            added: for a layer that the source has not. It takes the norms, q, k, v, gate and
                up of ``weight``, the source's last layer, and adds nothing to the stream.

        Returns:
            A tensor in the noise's dtype; ``d2t`` and ``t2d`` as they are.
        """
        if name in _UNCHANGED:
            return weight
        builder = self._builder(name)
        assert builder is not None, name
        if added and builder in (self._attention_output, self._mlp_output):
            weight = weight[:0]
        return builder(weight, noise)

    def _builder(self, name: str) -> Callable[[torch.Tensor, Noise], torch.Tensor] | None:
        *path, part, kind = ("", *name.split("."))
        if kind != "weight":
            return None
        if part.isdecimal():  # one of a list, such as ``fc_norm.0``
            part = path[-1]
        return dict.fromkeys(_NORMS, self._norm).get(part) or {
            "embed_tokens": self._embedding,
            "lm_head": self._output,
            "fc": self._fc,
            "q_proj": self._query,
            "k_proj": self._key,
            "v_proj": self._value,
            "o_proj": self._attention_output,
            "gate_proj": self._mlp_input,
            "up_proj": self._mlp_input,
            "down_proj": self._mlp_output,
        }.get(part)

    def _norm(self, weight_h: torch.Tensor, noise: Noise) -> torch.Tensor:
        repeats = math.ceil(self.wide.hidden_size / len(weight_h))
        scale = math.sqrt(self.source.hidden_size / self.wide.hidden_size)
        return (weight_h * scale).repeat(repeats)[: self.wide.hidden_size].to(noise.dtype)

    def _embedding(self, weight_Vh: torch.Tensor, noise: Noise) -> torch.Tensor:
        free = self.wide.hidden_size - self.source.hidden_size
        return torch.nn.functional.pad(weight_Vh.to(noise.dtype), (0, free))

    def _output(self, weight_Vh: torch.Tensor, noise: Noise) -> torch.Tensor:
        wide_VH = noise.draw(len(weight_Vh), self.wide.hidden_size)
        wide_VH[:, : self.source.hidden_size] = weight_Vh
        return wide_VH

    def _fc(self, weight_hF: torch.Tensor, noise: Noise) -> torch.Tensor:
        h, weight_hSh = self.source.hidden_size, self._blocks(weight_hF)
        wide_HSH = noise.draw(self.wide.hidden_size, weight_hSh.shape[1], self.wide.hidden_size)
        wide_HSH[h:, :, :h] = 0  # fc has no pairs that could cancel
        wide_HSH[:h, :, :h] = weight_hSh
        return wide_HSH.flatten(1)

    def _query(self, weight: torch.Tensor, noise: Noise) -> torch.Tensor:
        weight_NdSh = self._heads(weight) * math.sqrt(self.wide.head_dim / self.source.head_dim)
        wide_PDSH = self._draw_heads(self.wide.num_heads // 2, weight_NdSh, noise)
        real_PDSh = wide_PDSH[..., : self.source.hidden_size]
        # An assignment by index, unlike one by slices, does not convert the dtype.
        real_PDSh[self._pairs[:, None], self._rotary_dims] = weight_NdSh.to(noise.dtype)
        return _twice(wide_PDSH).flatten(2).flatten(0, 1)

    def _key(self, weight: torch.Tensor, noise: Noise) -> torch.Tensor:
        weight_KdSh = self._heads(weight).repeat_interleave(self._kv_copies, 0)
        wide_KDSH = self._draw_heads(self.wide.num_kv_heads, weight_KdSh, noise)
        used_KDSH = wide_KDSH[: len(weight_KdSh)]
        used_KDSH[:, self._free_dims] = 0  # q is random there
        used_KDSH[..., : self.source.hidden_size][:, self._rotary_dims] = weight_KdSh.to(
            noise.dtype
        )
        return wide_KDSH.flatten(2).flatten(0, 1)

    def _value(self, weight: torch.Tensor, noise: Noise) -> torch.Tensor:
        weight_KdSh = self._heads(weight).repeat_interleave(self._kv_copies, 0)
        wide_KDSH = self._draw_heads(self.wide.num_kv_heads, weight_KdSh, noise)
        copies, d, _, h = weight_KdSh.shape
        wide_KDSH[:copies, :d, :, :h] = weight_KdSh
        return wide_KDSH.flatten(2).flatten(0, 1)

    def _attention_output(self, weight_hQ: torch.Tensor, noise: Noise) -> torch.Tensor:
        rows, d = len(weight_hQ), self.source.head_dim
        wide_HPD = noise.draw(self.wide.hidden_size, self.wide.num_heads // 2, self.wide.head_dim)
        wide_HP2D = torch.stack((wide_HPD, -wide_HPD), 2)
        halves_hN1d = (weight_hQ / 2).unflatten(1, (-1, 1, d)).to(noise.dtype)
        wide_HP2D[:rows, self._pairs, :, :d] = halves_hN1d.expand(-1, -1, 2, -1)
        return wide_HP2D.flatten(1)

    def _mlp_input(self, weight_ih: torch.Tensor, noise: Noise) -> torch.Tensor:
        wide_PH = noise.draw(self.wide.intermediate_size // 2, self.wide.hidden_size)
        wide_PH[: len(weight_ih), : self.source.hidden_size] = weight_ih
        return _twice(wide_PH)

    def _mlp_output(self, weight_hi: torch.Tensor, noise: Noise) -> torch.Tensor:
        rows, channels = weight_hi.shape
        wide_HP = noise.draw(self.wide.hidden_size, self.wide.intermediate_size // 2)
        wide_HP2 = torch.stack((wide_HP, -wide_HP), 2)
        wide_HP2[:rows, :channels] = (weight_hi / 2).unsqueeze(-1)
        return wide_HP2.flatten(1)

    def _blocks(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.unflatten(-1, (-1, self.source.hidden_size))

    def _heads(self, weight: torch.Tensor) -> torch.Tensor:
        return self._blocks(weight).unflatten(0, (-1, self.source.head_dim))

    def _draw_heads(self, count: int, weight_NdSh: torch.Tensor, noise: Noise) -> torch.Tensor:
        blocks = weight_NdSh.shape[2]
        return noise.draw(count, self.wide.head_dim, blocks, self.wide.hidden_size)


def _twice(rows: torch.Tensor) -> torch.Tensor:
    return rows.repeat_interleave(2, 0)
