"""Any RoPE causal LM of transformers, run by F: its rotation is deferred and its attention is ours.

The model's own code runs, neither forked nor changed for others. Its attention is chosen by name through transformers'
`AttentionInterface`, and this instance's attention modules run their own `forward` with a rotation that leaves queries
and keys as projected. Attention then rotates with the model's own function and its own angles, at the positions that
segmented execution gives (design, section 4).

Shapes: B sequences, T tokens, H KV heads, G query heads per KV head, D head dimension, C hidden dimension, N positions.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from segcore.attention.sdpa import sdpa_attention
from segcore.errors import UnsupportedModel
from segcore.row_products import OneRow

if TYPE_CHECKING:
    from segcore.retrieval.query_maps import QueryMaps

ATTENTION_NAME = "segcore"
# What transformers' model files call their rotation.
ROTATION = "apply_rotary_pos_emb"
Rotate = Callable[..., tuple[Tensor, Tensor]]
# Views of where keys, rotated keys and values are kept, [H, T, D] each.
Rows = tuple[Tensor, Tensor, Tensor]
# What reached attention, by layer: queries, [H*G, T, D], keys, [H, T, D], and the scale.
Seen = dict[int, tuple[Tensor, Tensor, float]]


class AttendTogether(ABC):
    """What runs in place of the model's attention for a whole batch, once per layer."""

    @abstractmethod
    def __call__(self, layer: int, q_BHGTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, scale: float) -> Tensor:
        """Takes unrotated queries and keys; returns the attention output, [B, H, G, T, D]."""


class Attend(Protocol):
    """What runs in place of the model's attention, once per layer of a forward pass."""

    def __call__(self, layer: int, q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float) -> Tensor:
        """Takes unrotated queries and keys; returns the attention output, [H, G, T, D]."""
        ...


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a model, as far as the engine needs it. scale: its attention multiplies dot products by this."""

    architecture: str
    layers: int
    kv_heads: int
    queries_per_kv_head: int
    head_dim: int
    scale: float
    vocabulary: int
    max_positions: int
    dtype: torch.dtype
    device: torch.device


class Rope:
    """The model's own rotation at positions 0..N-1; the table grows on demand."""

    def __init__(self, angles: nn.Module, rotate: Rotate, like: Tensor) -> None:
        self._angles, self._rotate, self._like = angles, rotate, like
        self._cos_1ND, self._sin_1ND = self._table(1024)
        self._rotate_into: Callable[..., Tensor] = partial(_rotate_into, rotate)
        self.halves = self._turns_halves()

    @property
    def table(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [N, D] each, as the rotation takes them. It may be another one once it has grown."""
        return self._cos_1ND[0], self._sin_1ND[0]

    def reserve(self, positions: int) -> None:
        """Let the table hold so many positions."""
        self._at(positions, 0)

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that are rotated."""
        return self._cos_1ND.shape[-1]

    def turns_whole_heads(self, head_dim: int) -> bool:
        """Whether the rotation is the usual one, by halves, of all of a head: what kernels of ours do."""
        return self.halves and self.rotary_dim == head_dim

    def _table(self, positions: int) -> tuple[Tensor, Tensor]:
        ids = torch.arange(positions, device=self._like.device)[None]
        with torch.inference_mode(False), torch.no_grad():  # the table serves training too
            cos, sin = self._angles(self._like, ids)
        return cos, sin

    def __call__(self, q_HTD: Tensor, k_HTD: Tensor, first_position: int) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys that stand at positions first_position, first_position + 1, ..."""
        return self.turn(q_HTD, k_HTD, *self._at(first_position, k_HTD.shape[1]))

    def turn(self, q_HTD: Tensor, k_HTD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by rows of the table."""
        q, k = self._rotate(q_HTD[None], k_HTD[None], cos_1TD, sin_1TD)
        return q[0], k[0]

    def keys(self, k_HTD: Tensor, first_position: int) -> Tensor:
        """Rotate keys alone."""
        return self(k_HTD[:0], k_HTD, first_position)[1]

    def into(self, rows: Rows, q_HTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, first_position: int) -> Tensor:
        """Rotate, write keys, rotated keys and values to `rows`, and return the rotated queries. No gradient passes."""
        cos, sin = self._at(first_position, k_HTD.shape[1])
        by_halves = q_HTD.is_cpu and self.turns_whole_heads(q_HTD.shape[-1])
        return (_turn_into if by_halves else self._rotate_into)(rows, q_HTD, k_HTD, v_HTD, cos, sin)

    def compile(self) -> None:
        """Let torch fuse `into`."""
        self._rotate_into = torch.compile(partial(_rotate_into, self._rotate))

    def _turns_halves(self) -> bool:
        """Whether the model's function is the usual one: `_turn_into` gives the same, bit for bit."""
        tokens, dim = self._cos_1ND.shape[1:]
        generator = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, 1, tokens, dim, generator=generator).to(self._like)
        ours, own = self._like.new_empty(2, 3, 1, tokens, dim)
        given = (q, k, k, *self._at(0, tokens))
        queries = _turn_into(ours.unbind(), *given), _rotate_into(self._rotate, own.unbind(), *given)
        return torch.equal(*queries) and torch.equal(ours, own)

    def _at(self, first_position: int, tokens: int) -> tuple[Tensor, Tensor]:
        stop = first_position + tokens
        if stop > self._cos_1ND.shape[1]:
            self._cos_1ND, self._sin_1ND = self._table(max(stop, 2 * self._cos_1ND.shape[1]))
        return self._cos_1ND[:, first_position:stop], self._sin_1ND[:, first_position:stop]


def _rotate_into(
    rotate: Rotate, rows: Rows, q_HTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor
) -> Tensor:
    rotated_q, rotated_k = rotate(q_HTD[None], k_HTD[None], cos_1TD, sin_1TD)
    for row, value in zip(rows, (k_HTD, rotated_k[0], v_HTD), strict=True):
        row.copy_(value)
    return rotated_q[0]


def _turn_into(rows: Rows, q_HTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> Tensor:
    """`_rotate_into` by the usual rotation, x cos + (-x2, x1) sin, without a copy of the halves that change places."""
    for row, value in zip(rows[::2], (k_HTD, v_HTD), strict=True):
        row.copy_(value)
    for x_HTD, out_HTD in ((q_HTD, q := torch.empty_like(q_HTD)), (k_HTD, rows[1])):
        torch.mul(x_HTD, cos_1TD, out=out_HTD)
        first, second = (x_HTD * sin_1TD).chunk(2, dim=-1)
        to_first, to_second = out_HTD.chunk(2, dim=-1)
        to_first -= second
        to_second += first
    return q


def _defer_rotation(module: nn.Module) -> None:
    """Give an attention module its own `forward` again, in which the rotation by its file's function does nothing."""
    module.forward = types.MethodType(_without_rotation(cast(Any, type(module))), module)


@functools.cache  # one for all of a kind: compiled code belongs to a function's names
def _without_rotation(kind: type[nn.Module]) -> types.FunctionType:
    own = cast(types.FunctionType, inspect.unwrap(kind.forward))
    names = own.__globals__ | {ROTATION: lambda q, k, *angles, **options: (q, k)}
    twin = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    twin.__kwdefaults__ = own.__kwdefaults__
    return twin


class _NoAngles(nn.Module):
    """Stands where the model made the angles of its rotation, which nothing reads any more."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return x, x


class _Given(nn.Module):
    """Stands where the model's body stood and gives back what it is given."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    segcore_attend: Sequence[Attend] | AttendTogether,
    **extra: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; [B, H*G, T, D] in, [B, T, H*G, D] out. Sequences beyond the callbacks pad."""
    batch, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    scale = dim**-0.5 if scaling is None else scaling
    for term in ("sliding_window", "softcap", "s_aux"):
        if extra.get(term) is not None:
            raise UnsupportedModel(f"{type(module).__name__} can't be run exactly: its attention has a {term} term")
    layer, q_BHGTD = cast(int, module.layer_idx), query.view(batch, kv_heads, heads // kv_heads, tokens, dim)
    if isinstance(segcore_attend, AttendTogether):
        return segcore_attend(layer, q_BHGTD, key, value, scale).flatten(1, 2).transpose(1, 2), None
    sequences = zip(segcore_attend, q_BHGTD, key, value, strict=False)
    out = [attend(layer, q_HGTD, k_HTD, v_HTD, scale) for attend, q_HGTD, k_HTD, v_HTD in sequences]
    out += [torch.zeros_like(out[0])] * (batch - len(out))
    out_BHGTD = torch.stack(out) if batch > 1 else out[0][None]  # one is not copied
    return out_BHGTD.flatten(1, 2).transpose(1, 2), None


# What attends is Python, and keeps state: not for a compiler.
AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(_attention))


class CausalLM:
    """A transformers causal LM whose attention is given call by call. Takes over the model it is handed.

    Its weights are frozen; training trains those that ask for gradients again, or an adapter that is added to `model`.
    parameters: how many numbers its weights are. query_maps: learned maps of its selectors' queries, if it has any.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_supported(model)
        base = cast(Any, model.base_model)
        weight = next(model.parameters())
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.query_maps: QueryMaps | None = None
        rotate = getattr(sys.modules[type(_attention_modules(model)[0]).__module__], ROTATION)
        self.rope = Rope(base.rotary_emb, rotate, torch.empty(0, dtype=weight.dtype, device=weight.device))
        self.model = model.eval().requires_grad_(False)
        own_logits = _own_logits(model)
        model.set_attn_implementation(ATTENTION_NAME)
        own_rotation = self._record()
        for attention in _attention_modules(model):
            _defer_rotation(attention)
        unrotated = self._record()
        self.spec = self._measure(unrotated)
        self._check_rotation(unrotated, own_rotation)
        self._check_logits(own_logits)
        base.rotary_emb = _NoAngles()

    def __call__(self, tokens_T: Tensor, attend: Attend, *, all_logits: bool = False) -> Tensor:
        """One forward pass over the tokens; logits of the last token, [1, V], or of all, [T, V]."""
        return self.batch(tokens_T[None], [attend], all_logits=all_logits)[0]

    def batch(self, tokens_BT: Tensor, attends: Sequence[Attend], *, all_logits: bool = False) -> Tensor:
        """The same for several sequences, each with its own attention; [B, 1, V] or [B, T, V].

        Sequences beyond `attends` are padding: they run, and what comes out of them means nothing.
        """
        return self.head(self.hidden(tokens_BT, attends), all_logits=all_logits)

    def hidden(self, tokens_BT: Tensor, attends: Sequence[Attend] | AttendTogether) -> Tensor:
        """What the model makes logits of, normed, [B, T, C]; see `batch`."""
        body = cast(nn.Module, self.model.base_model)
        return cast(Tensor, body(input_ids=tokens_BT, use_cache=False, segcore_attend=attends).last_hidden_state)

    def attend_in_full(self, layer: int, q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float) -> Tensor:
        """An `Attend` for a stream in one pass: full attention, as the model's own."""
        q, k = self.rope(q_HGTD.flatten(0, 1), k_HTD, 0)
        return sdpa_attention(q.view_as(q_HGTD), k, v_HTD, scale)

    def head(self, hidden_BTC: Tensor, *, all_logits: bool = True) -> Tensor:
        """Logits of all tokens or the last, by the model's own code, its scaling and cap included."""
        # The last position by its index, not as a slice: torch would copy the whole head's weights for a strided input.
        last = torch.full((1,), hidden_BTC.shape[1] - 1, device=hidden_BTC.device)
        # A twin of the model as it is now, with the same head, whose body gives what it is given.
        twin = copy.copy(self.model)
        twin._modules = {**self.model._modules, self.model.base_model_prefix: _Given()}
        output = twin(inputs_embeds=hidden_BTC, use_cache=False, logits_to_keep=0 if all_logits else last)
        return cast(Tensor, output.logits)

    def compile(self) -> None:
        """Let torch fuse what each layer does around its attention; the first passes of a shape take longer for it."""
        self.rope.compile()
        options = {"post_grad_custom_pre_pass": OneRow()} if self.spec.device.type == "cuda" else None
        for layer in self.layers:
            layer.compile(options=options)

    @property
    def modules(self) -> list[nn.Module]:
        """All that has weights."""
        return [self.model] if self.query_maps is None else [self.model, self.query_maps]

    @property
    def layers(self) -> list[nn.Module]:
        """The model's layers, first to last."""
        attention = set(_attention_modules(self.model))
        return [m for m in self.model.modules() if attention.intersection(m.children())]

    def _record(self) -> Seen:
        """What reaches attention for the probe's tokens."""
        seen: Seen = {}

        def look(layer: int, q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float) -> Tensor:
            if v_HTD.shape != k_HTD.shape:
                raise UnsupportedModel(f"{type(self.model).__name__}: its values differ in shape from its keys")
            seen[layer] = (q_HGTD.flatten(0, 1), k_HTD, scale)
            # What attention returns doesn't matter, as long as it is the same with and without rotation.
            return torch.zeros_like(q_HGTD)

        with torch.inference_mode():
            self(_probe_tokens(self.model), look)
        return seen

    def _measure(self, seen: Seen) -> ModelSpec:
        """Read the shape off what reached attention, so that no config field's name or meaning is guessed."""
        name, config = type(self.model).__name__, _config(self.model)
        if sorted(seen) != list(range(config.num_hidden_layers)):
            raise UnsupportedModel(
                f"{name}: only layers {sorted(seen)} of {config.num_hidden_layers} call the attention interface"
            )
        q, k, scale = seen[0]
        if any((x.shape, y.shape, z) != (q.shape, k.shape, scale) for x, y, z in seen.values()):
            raise UnsupportedModel(f"{name}: its layers differ in heads, head dimension or scale")
        return ModelSpec(
            architecture=name,
            layers=len(seen),
            kv_heads=k.shape[0],
            queries_per_kv_head=q.shape[0] // k.shape[0],
            head_dim=k.shape[-1],
            scale=scale,
            vocabulary=config.vocab_size,
            max_positions=config.max_position_embeddings,
            dtype=k.dtype,
            device=k.device,
        )

    def _check_rotation(self, plain: Seen, rotated: Seen) -> None:
        """Refuse a model that rotates otherwise than `rope` does, in any layer."""
        for layer, (q, k, _) in plain.items():
            for ours, own in zip(self.rope(q, k, 0), rotated[layer][:2], strict=True):
                if not _relative_error(ours, own) <= _rounding(own.dtype):
                    raise UnsupportedModel(
                        f"{self.spec.architecture}: layer {layer} doesn't rotate queries and keys as RoPE does"
                    )

    def _check_logits(self, own_TV: Tensor) -> None:
        """Refuse a model whose attention does more than softmax over rotated keys."""
        with torch.inference_mode():
            ours_TV = self(_probe_tokens(self.model), self.attend_in_full, all_logits=True)
        error = _relative_error(ours_TV, own_TV)
        if not error <= 10 * _rounding(own_TV.dtype):  # rounding adds up over the layers
            raise UnsupportedModel(
                f"{self.spec.architecture}: its attention isn't plain RoPE attention: with segcore's, its logits"
                f" differ from its own code's by {error:.2g} of their range"
            )


def _relative_error(ours: Tensor, own: Tensor) -> float:
    return float((ours - own).abs().max() / own.abs().max())


def _rounding(dtype: torch.dtype) -> float:
    """How far apart two orders of the same arithmetic may end up, relative to the largest value."""
    return 0.01 if dtype in (torch.float16, torch.bfloat16) else 1e-5


def check_supported(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel, naming the architecture and the reason, for what can't be run exactly."""
    name, config = type(model).__name__, _config(model)

    def refuse(reason: str) -> None:
        raise UnsupportedModel(f"{name} can't be run exactly: {reason}")

    if any(hasattr(config, part) for part in ("vision_config", "audio_config")):
        refuse("it is multimodal; segcore runs text-only models")
    if getattr(config, "is_encoder_decoder", False):
        refuse("it is an encoder-decoder model, not a causal LM")
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        refuse("it uses ALiBi, a bias by distance; segcore defers RoPE rotations")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        refuse(f"its layers are of kinds {', '.join(sorted(kinds))}; only full attention can be segmented")
    window = getattr(config, "sliding_window", None)
    if window and not getattr(config, "layer_types", None) and getattr(config, "use_sliding_window", True):
        refuse(f"its layers attend within a sliding window of {window} tokens")
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        refuse("it has no rotary_emb module, so its positions aren't RoPE, or not where transformers keeps them")
    kind = getattr(rotary, "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        refuse(f"its RoPE angles ({kind}) change with the length of the stream")
    modules = _attention_modules(model)
    if not modules:
        refuse("no attention module with a layer index was found")
    if not hasattr(sys.modules[type(modules[0]).__module__], ROTATION):
        refuse("its rotation function wasn't found")


def _config(model: PreTrainedModel) -> Any:
    return model.config


def _attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "num_key_value_groups")]


def _probe_tokens(model: PreTrainedModel) -> Tensor:
    """A fixed pseudo-random stream of 24 tokens for the parity check."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, _config(model).vocab_size, (24,), generator=generator).to(model.device)


def _own_logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return cast(Tensor, model.eval()(input_ids=_probe_tokens(model)[None], use_cache=False).logits[0])
