# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "numpy"]
# ///
"""The decoder transformer: the model of every script here, whole, in one file.

    from gpt import GPT, GPTConfig
    model = GPT(GPTConfig(n_layer=4, vocab_size=4096))      # random weights
    logits = model(tokens)                                  # (B, T) ids -> (B, T, V) scores
    loss = model(tokens, targets)                           # nats per target token
    for step in model.generate(tokens, 100): ...            # (B,) ids, as they are made
    model.save_pretrained("out/mine")                       # opens in transformers, too
    model = GPT.from_pretrained("out/mine")                 # or what a model hub has

A language model gives, for each place in a text, a probability to every token that could come next.
Here is how, bottom to top: a token becomes a vector (its row of a matrix); layers alternate between
mixing vectors across places (Attention) and transforming each vector by itself (MLP); a last matrix
turns each vector into V scores, the logits.

The model families that one can download are this with a few parts exchanged. The names of the
weights are those of the Llama family's checkpoints, so what is trained here opens elsewhere as it
is, and the other way round (GPT-2's are renamed on the way in and out):

    family   norm       positions  feed-forward  biases   besides
    gpt2     LayerNorm  learned    GELU          all      (2019; Cerebras-GPT, ...)
    llama    RMSNorm    rotary     SwiGLU        none     (Llama 2 and 3, SmolLM2, ...)
    mistral  RMSNorm    rotary     SwiGLU        none
    qwen2    RMSNorm    rotary     SwiGLU        q, k, v  (Qwen 2.5)
    qwen3    RMSNorm    rotary     SwiGLU        none     norms on q and k; what we train by default

Left out on purpose: experts, sliding windows, other rotary scalings; from_pretrained refuses by
name whatever would change the function and is not written here.

Reading order: config, parts, GPT, generation, files, and last what only training needs.
Legend, in all files: B rows in a batch, T time, that is tokens or places in a row, S places seen
(T and those before), C width (n_embd), H query heads (n_head), K key-value heads (n_kv_head), D
head size (head_dim), V vocabulary (vocab_size). Autocast is torch's way to multiply in fewer bits
than the weights have.
"""
import ctypes
import json
import math
import mmap
import os
import re
import timeit
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint


# ---------------------------------------------------------------- configuration

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


@dataclass
class GPTConfig:
    """The shape of a model. `n_layer` is the one dial: what is None is derived from it.

    Raises ValueError, one line, when the numbers do not fit each other.
    """
    vocab_size: int = 4096
    block_size: int = 256          # the longest row that the model is trained on, in tokens
    n_layer: int = 4
    n_embd: int | None = None      # 64 per layer: deeper models are wider in step
    n_head: int | None = None      # one for every 64 of width, as in GPT-2
    n_kv_head: int | None = None   # one for two query heads, where that goes: half the cache
    head_dim: int | None = None    # n_embd / n_head
    n_inner: int | None = None     # 8/3 n_embd, so that SwiGLU's 3 matrices cost what 2 of 4x would
    rope_theta: float = 10000.0    # rotary positions: no wavelength is longer than 2 pi times this
    rope_scaling: dict | None = None    # how rows longer than those of the training are read
    norm_eps: float = 1e-6
    tie_embeddings: bool = True    # input and output matrix are one: V x C weights saved
    dropout: float = 0.0           # share of each layer's output that training sets to zero
    family: str = "qwen3"          # a row of the table above

    def __post_init__(self):
        def derive(name, value):
            if getattr(self, name) is None:
                setattr(self, name, value)
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a whole number "
                                 "above 0")
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is not one of {', '.join(FAMILIES)}")
        old = self.family == "gpt2"
        for name in ("vocab_size", "block_size", "n_layer"):
            derive(name, None)
        derive("n_embd", 64 * self.n_layer)
        heads = range(max(1, self.n_embd // 64), 1, -1)         # of these the first that divides
        derive("n_head", next((n for n in heads if self.n_embd % (2 * n) == 0), 1))
        derive("n_kv_head", self.n_head if old or self.n_head % 2 else self.n_head // 2)
        derive("n_inner", 4 * self.n_embd if old else (self.n_embd * 8 // 3 + 63) // 64 * 64)
        if self.head_dim is None and self.n_embd % self.n_head:
            nearest = max(1, round(self.n_embd / (2 * self.n_head))) * 2 * self.n_head
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; "
                             f"the nearest that is: {nearest}")
        derive("head_dim", self.n_embd // self.n_head)
        if old and (self.n_kv_head, self.head_dim * self.n_head) != (self.n_head, self.n_embd):
            raise ValueError(f"n_kv_head {self.n_kv_head}, head_dim {self.head_dim}: gpt2 has "
                             "n_head key-value heads, of n_embd / n_head each")
        if self.head_dim % 2 and not old:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions turn pairs, so it "
                             "must be even")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head "
                             f"{self.n_kv_head}; each serves an equal number of query heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}; it must be at least 0 and less than 1")
        if self.rope_scaling is not None:
            needs = {"linear": ("factor",), "llama3": (
                "factor", "low_freq_factor", "high_freq_factor",
                "original_max_position_embeddings")}.get(self.rope_scaling.get("rope_type"), ("",))
            if any(type(self.rope_scaling.get(name)) not in (int, float) for name in needs):
                raise ValueError(f"rope_scaling is {self.rope_scaling!r}; only the rope_type "
                                 "'linear' and 'llama3' are understood, with their numbers")


# ---------------------------------------------------------------- the parts

class Linear(nn.Linear):
    """y = x W^T + b, x (..., in) -> (..., out); W (out, in), perhaps in int8 (see quantize)."""

    def __init__(self, *sizes, bias: bool):
        super().__init__(*sizes, bias=bias)
        self.register_parameter("scale", None)      # (out,), if W is scale * int8 numbers

    def forward(self, x):
        if self.scale is None:
            return F.linear(x, self.weight, self.bias)
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias

    def rows(self, ids):
        """The weight's rows of these numbers: ids (...) -> (..., in). This is an embedding."""
        if self.scale is None:
            return F.embedding(ids, self.weight)
        return self.weight[ids].to(self.scale.dtype) * self.scale[ids][..., None]


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale each coordinate (arXiv:1910.07467).

    Layers add to x, so x grows; each part reads a copy of constant size.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        # The weight in the type of x: torch has one fused kernel for that, none for mixed types.
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def make_norm(config: GPTConfig) -> nn.Module:
    """LayerNorm (arXiv:1607.06450) subtracts the mean first, and adds a bias; RMSNorm came to be
    preferred because neither makes a difference that can be measured."""
    return (nn.LayerNorm if config.family == "gpt2" else RMSNorm)(config.n_embd, config.norm_eps)


def rotary(positions, config: GPTConfig):
    """Angles that encode positions (B, T): cos and sin, each (B, T, 1, D/2), for all heads; fp32.

    Attention itself is blind to order. RoPE (arXiv:2104.09864, section 3.2) cuts a head's D
    coordinates into D/2 pairs and turns pair i by position * theta^(-2i/D): fast clock hands and
    slow ones. The dot product of a turned query and a turned key then knows only how far apart they
    are, not where.

    To read rows longer than those it was trained on, a model turns its hands more slowly: all of
    them ("linear", arXiv:2306.15595), or only those so slow that the training never saw them go
    round ("llama3", arXiv:2407.21783, section 3.4.2), with a smooth passage between.
    """
    D, scaling = config.head_dim, config.rope_scaling
    exponents = torch.arange(0, D, 2, device=positions.device).float() / D
    speed = config.rope_theta ** -exponents                         # (D/2,) radians per place
    if scaling:
        fast = 0.0
        if scaling["rope_type"] == "llama3":
            turns = speed * scaling["original_max_position_embeddings"] / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            fast = ((turns - low) / (high - low)).clamp(0, 1)       # 0 slow, 1 fast
        speed = speed * (fast + (1 - fast) / scaling["factor"])
    angles = positions[..., None, None] * speed
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the pairs of x (B, T, H, D). Pair i is coordinates i and i + D/2, Llama's layout."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def attend(q, k, v, seen=None):
    """softmax(q k^T / sqrt(D)) v, where no place sees a later one (arXiv:1706.03762, eq. 1).

    q (B, H, T, D); k, v (B, K, S, D) with S >= T: the queries are the last T of S places.
    Head h reads key-value head h // (H/K) (grouped queries, arXiv:2305.13245). -> (B, H, T, D)
    seen (B, 1, T, S) says who sees whom instead, where True.
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    if q.is_cpu and q.dtype == torch.bfloat16 and q.requires_grad and T == S <= 512:
        # Training on a CPU: the backward pass of torch's fused kernel does not use the bf16 units,
        # and plain products take half its time (up to some length: they store T x T scores). The
        # queries of a group stand below each other, so that their keys need not be copied:
        # (B, K, H/K T, D) @ (B, K, D, T).
        scores = (q * D**-0.5).reshape(B, K, -1, D) @ k.mT
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores = scores.view(B, K, -1, T, T).masked_fill(future, -math.inf)
        # Autocast would copy the scores to fp32; the bf16 softmax adds up in fp32 as it is.
        with torch.autocast("cpu", enabled=False):
            weights = scores.softmax(dim=-1)
        return (weights.view(B, K, -1, T) @ v).view(B, H, T, D)
    if seen is None and 1 < T < S:      # of the triangle that S queries see, the last T rows
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None and T > 1, enable_gqa=H != K)


class Attention(nn.Module):
    """Each place asks (query); each place up to it offers (key) and, as far as they match, tells
    (value). H heads ask different questions at the same time."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        bias = config.family in ("gpt2", "qwen2")
        self.q_proj = Linear(C, config.n_head * D, bias=bias)
        self.k_proj = Linear(C, config.n_kv_head * D, bias=bias)
        self.v_proj = Linear(C, config.n_kv_head * D, bias=bias)
        self.o_proj = Linear(config.n_head * D, C, bias=config.family == "gpt2")
        if config.family == "qwen3":
            # Norms on queries and keys keep scores from growing without limit, which would flatten
            # the softmax's gradient: higher learning rates stay stable (arXiv:2302.05442, sect. 2).
            self.q_norm, self.k_norm = RMSNorm(D, config.norm_eps), RMSNorm(D, config.norm_eps)
        self.config = config

    def forward(self, x, angles, past=None, lengths=None):
        """x (B, T, C) -> (B, T, C). past: this layer's part of a Cache, the number of places in it,
        and Cache.seen. lengths: see GPT.forward."""
        B, T, C = x.shape
        D = self.config.head_dim
        q = self.q_proj(x).view(B, T, -1, D)                               # -> (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, D)                               # -> (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, D)                               # -> (B, T, K, D)
        if self.config.family == "qwen3":
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if lengths is not None:
            # Documents in a row become rows of a batch. They are padded at the end, where nobody
            # who counts can see: attention looks back. N documents, the longest L: (N, L, H, D).
            q, k, v = (pad_sequence(z.flatten(0, 1).split(lengths), batch_first=True)
                       for z in (q, k, v))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # -> (B, H or K, T, D)
        seen = None
        if past is not None:
            memory, start, seen = past
            memory[0, :, :, start:start + T], memory[1, :, :, start:start + T] = k, v
            k, v = memory[:, :, :, :start + T]                             # -> (B, K, S, D)
        y = attend(q, k, v, seen).transpose(1, 2)                          # -> (B, T, H, D)
        if lengths is not None:
            y = torch.cat([row[:length] for row, length in zip(y, lengths)])
        return self.o_proj(y.reshape(B, T, -1))                            # -> (B, T, C)


class MLP(nn.Module):
    """n_inner detectors per place. GELU (arXiv:1606.08415) lets those through that fire; SwiGLU
    (arXiv:2002.05202) gives each a gate that opens or closes it.

    Attention moves information; most of what the model knows is stored here.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gated, bias = config.family != "gpt2", config.family == "gpt2"
        if self.gated:
            self.gate_proj = Linear(config.n_embd, config.n_inner, bias=bias)
        self.up_proj = Linear(config.n_embd, config.n_inner, bias=bias)
        self.down_proj = Linear(config.n_inner, config.n_embd, bias=bias)

    def forward(self, x):
        if self.gated:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class Block(nn.Module):
    """One layer. Both parts read a normed copy and *add* to x, the residual stream: the gradient
    has a straight way down through the sums, which is why deep stacks train at all."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, angles, past=None, lengths=None):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), angles, past, lengths))
        x = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return x


def cross_entropy(x, head: Linear, targets):
    """-ln p of each target: x (N, C) before the output matrix, targets (N,) -> (N,), nats.

    A target of -100 (torch's default `ignore_index`) costs 0. The logits of all N places at once
    would be the largest thing in memory by far. So they are made in pieces, which are forgotten
    and, in the backward pass, made once more.
    """
    def piece(x, targets):
        # At least fp32: a sum over V terms in bf16 would lose the small ones.
        logits = head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="none")
    size = max(1, 2**24 // len(head.weight))        # rows that make 16 million logits
    if len(x) <= size:
        return piece(x, targets)
    return torch.cat([checkpoint(piece, *both, use_reentrant=False)
                      for both in zip(x.split(size), targets.split(size))])


# ---------------------------------------------------------------- the model

class GPT(nn.Module):

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.family == "gpt2":
            self.embed_positions = Linear(config.n_embd, config.block_size, bias=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        # True: what the layers compute inside is made again in the backward pass instead of being
        # kept: less memory, a third more time.
        self.recompute = False
        if not self.norm.weight.is_meta:        # without memory there is nothing to fill
            self.init_weights()

    def forward(self, tokens, targets=None, lengths=None, reduction="mean"):
        """tokens (B, T) ids -> logits (B, T, V); with targets (B, T) -> their mean loss, a scalar.

        The loss is the cross-entropy in nats per target token: what the model pays, -ln p, for
        each token that really came. Targets of -100 cost nothing and are not counted; if all are,
        the loss is 0. reduction="none": the loss of each place, (B, T).
        lengths: the rows hold documents of these lengths, one after the other, B * T tokens in all;
        each is read as if it were alone, at the price of its own length.
        """
        x = self.hidden(tokens, lengths=lengths)
        if targets is None:
            return self.head(x)
        x, flat = x.flatten(0, 1), targets.flatten()
        if lengths is None:
            losses = cross_entropy(x, self.head, flat)
        else:       # packed documents are often prompts with replies: only replies need logits
            places = (flat != -100).nonzero()[:, 0]
            losses = cross_entropy(x[places], self.head, flat[places])
            losses = losses.new_zeros(len(flat)).index_put((places,), losses)
        if reduction == "none":
            return losses.view(targets.shape)
        return losses.sum() / (flat != -100).sum().clamp(min=1)

    def hidden(self, tokens, cache=None, lengths=None):
        """All but the output matrix: tokens (B, T) -> (B, T, C). With a cache, tokens continue what
        it holds."""
        B, T = tokens.shape
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + T, device=tokens.device)[None]          # (1, T)
        if lengths is not None:
            positions = torch.cat([torch.arange(n, device=tokens.device) for n in lengths])
            positions = positions.view(B, T)
        if cache is not None and cache.padding is not None:
            positions = (positions - cache.padding[:, None]).clamp(min=0)               # (B, T)
        x, angles = self.embed_tokens.rows(tokens), None                                # (B, T, C)
        if self.config.family != "gpt2":
            angles = rotary(positions, self.config)
        elif start + T > self.config.block_size:
            raise ValueError(f"{start + T} places; this model has learned "
                             f"{self.config.block_size} positions")
        else:
            x = x + self.embed_positions.rows(positions)
        if torch.is_autocast_enabled(x.device.type):
            # What the layers add is in this type anyway; the sum in it halves the memory traffic.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        seen = None if cache is None else cache.seen(T)
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, angles, None, lengths, use_reentrant=False)
            else:
                past = None if cache is None else (cache.memory[i], start, seen)
                x = layer(x, angles, past, lengths)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    @property
    def head(self) -> Linear:
        """Makes logits. Row t of its matrix is the direction of token t; if tied, at both ends."""
        return self.embed_tokens if self.config.tie_embeddings else self.lm_head

    def init_weights(self):
        """Normal with standard deviation 0.02, GPT-2's, but for two kinds of matrices.

        A logit is a sum over the width, and the variances of independent terms add: so the ones
        that make logits shrink as 1 / sqrt(width), from 0.02 at GPT-2's width of 768. Then the
        first loss is equally near to ln V at any size. The ones that write into the residual
        stream get another 1 / sqrt(2 n_layer), because 2 n_layer of them are added up there (GPT-2
        paper, section 2.3)."""
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                std = 0.02
                if name.startswith(("embed_tokens", "lm_head")):
                    std *= math.sqrt(768 / self.config.n_embd)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(weight, std=std)

    def count_parameters(self) -> int:
        return sum(weight.numel() for weight in self.parameters())

    def flops_per_token(self) -> int:
        """Forward and backward, floating-point operations, at full block_size.

        Each weight of a matrix is one multiply-add forward and two backward: 6 operations. An input
        embedding is a look-up and costs nothing, but the output matrix does. Per head, q k^T and
        weights @ v are 2 D T operations a token each, three times that with backward: 12 H D T a
        layer (arXiv:2204.02311, appendix B; like there, the masked half is counted).
        """
        c = self.config
        matrices = sum(w.numel() for w in self.layers.parameters() if w.dim() == 2)
        return 6 * (matrices + self.head.weight.numel()) + (
            12 * c.n_layer * c.n_head * c.head_dim * c.block_size)

    def cache_bytes_per_token(self) -> int:
        """What generation keeps in memory for each place: a key and a value per layer and head."""
        c = self.config
        return 2 * c.n_layer * c.n_kv_head * c.head_dim * self.norm.weight.itemsize

    # ------------------------------------------------------------ generation

    def prefill(self, tokens, cache):
        """Read prompts (B, T) into the cache, all places at once. -> (B, V), what comes next."""
        return self.head(self.hidden(tokens, cache)[:, -1])

    def decode(self, tokens, cache):
        """Read one more token per row, (B,), at the price of one place. -> logits (B, V)."""
        return self.head(self.hidden(tokens[:, None], cache)[:, 0])

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
                 repetition_penalty: float = 1.0, stop=(), seed: int | None = None, cache=None):
        """Continue prompts, (B, T) or a list of rows of any lengths; yield the next ids (B,), step
        by step.

        temperature divides the logits: below 1 safer, above 1 wilder, 0 always the likeliest token.
        top_k keeps the k likeliest tokens, top_p the likeliest that together have probability p,
        min_p those at least min_p times as likely as the likeliest. repetition_penalty above 1
        makes what was already said less likely.
        Ends after max_new_tokens, or when every row has produced one of the `stop` ids; rows that
        have go on until then. The same seed gives the same tokens. When block_size places are full,
        the older half of them is forgotten, so that the rest need not be computed again for every
        token. cache: one of an earlier call (for chats): what it holds of the prompt is not
        computed again. Call eval() before if the model has dropout.
        """
        if temperature < 0 or (top_k is not None and top_k < 1) or repetition_penalty <= 0 or (
                top_p is not None and not 0 < top_p <= 1) or not 0 <= (min_p or 0) <= 1:
            raise ValueError(
                f"temperature {temperature} (at least 0), top_k {top_k} (at least 1), top_p {top_p}"
                f" (above 0, at most 1), min_p {min_p} (0 to 1) or repetition_penalty "
                f"{repetition_penalty} (above 0) is out of range")
        device = self.norm.weight.device
        T = max(map(len, prompts), default=0)
        if not all(map(len, prompts)) or T == 0:
            raise ValueError("generate needs at least one token to go on from")
        if cache is None:
            cache = Cache(self, len(prompts), min(self.config.block_size, T + max_new_tokens))
        # Shorter rows are padded in front, so that all end, and go on, at the same place. (With a
        # token of their own: then the repetition penalty sees nothing that is not there.)
        T = min(T, cache.size)
        prompts = [torch.as_tensor(row, device=device)[-T:] for row in prompts]
        context = torch.stack([F.pad(row, (T - len(row), 0), value=int(row[0])) for row in prompts])
        padding = torch.tensor([T - len(row) for row in prompts], device=device)
        cache.rewind(context, padding)
        random = torch.Generator(device)
        random.manual_seed(seed) if seed is not None else random.seed()
        stop = torch.tensor(sorted(stop), device=device, dtype=torch.long)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            if cache.length == cache.size:
                forgotten = context.shape[1] - max(1, cache.size // 2)
                context, padding = context[:, forgotten:], (padding - forgotten).clamp(min=0)
                cache.rewind(context, padding)
            new = context[:, cache.length:]
            alone = new.shape[1] == 1
            logits = self.decode(new[:, 0], cache) if alone else self.prefill(new, cache)
            cache.tokens = context
            next_tokens = sample(logits.float(), context, temperature, top_k, top_p, min_p,
                                 repetition_penalty, random)
            yield next_tokens
            ended |= torch.isin(next_tokens, stop)
            if ended.all():
                return
            context = torch.cat([context, next_tokens[:, None]], dim=1)

    # ------------------------------------------------------------ files

    def save_pretrained(self, directory, **extra):
        """Write config.json and model.safetensors, the layout of the family at Hugging Face.

        extra: more entries for config.json, such as eos_token_id. Each file is replaced whole.
        """
        if self.head.scale is not None:
            raise ValueError("int8 is for generation only: other programs can't open such files")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = self.state_dict()
        if self.config.family == "gpt2":
            tensors = to_gpt2(tensors)
        else:
            tensors = {name if name.startswith("lm_head") else f"model.{name}": weight
                       for name, weight in tensors.items()}
        write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
        dtype = str(self.norm.weight.dtype).removeprefix("torch.")
        with write_whole(directory / "config.json") as file:
            entries = write_config(self.config) | {"torch_dtype": dtype} | extra
            file.write(json.dumps(entries, indent=2).encode())

    @classmethod
    def from_pretrained(cls, directory, device="cpu", dtype=None):
        """Open what save_pretrained, transformers or a model hub wrote, ready to use (eval mode).

        dtype: of the weights; None: as in the file; torch.int8: matrices in int8 (see quantize).
        On a CPU, what needs no change stays memory-mapped. Raises ValueError or OSError, one line,
        for what is missing, damaged or not understood.
        """
        directory = Path(directory)
        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory} holds no config.json; give the directory of a model")
        try:
            config = read_config(json.loads((directory / "config.json").read_text("utf-8")))
        except ValueError as error:
            raise ValueError(f"{directory / 'config.json'}: {error}") from None

        def adopt(name, tensor) -> dict:
            """One tensor of a file -> those of ours that it stands for."""
            if name == "lm_head.weight" and config.tie_embeddings or name.endswith("inv_freq"):
                return {}       # a copy of the input matrix; the angles, in some old files
            ours = {name.removeprefix("model."): tensor}
            if config.family == "gpt2":
                ours = from_gpt2(name, tensor)
            for name, tensor in list(ours.items()):
                if dtype == torch.int8 and tensor.dim() == 2:
                    ours[name], ours[name.replace("weight", "scale")] = quantize(tensor)
                elif dtype not in (None, torch.int8):
                    ours[name] = tensor.to(dtype)
            return ours
        tensors = read_model(directory, adopt)
        with torch.device("meta"):      # no memory: the tensors of the file take the places
            model = cls(config)
        for module in model.modules():
            if isinstance(module, Linear) and dtype == torch.int8:
                module.scale = nn.Parameter(module.weight[:, 0].detach(), requires_grad=False)
                module.weight.requires_grad = False
        wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise ValueError(f"{directory}: {name} is {found.get(name, 'missing')}, "
                                 f"config.json asks for {wanted.get(name, 'none')}")
        model.load_state_dict(tensors, assign=True)
        return model.to(device).eval()


class Cache:
    """Keys and values of the places already seen, so that a new token computes only its own."""

    def __init__(self, model: GPT, batch: int, size: int):
        """For `batch` rows of at most `size` places; memory is taken once."""
        c = model.config
        self.memory = model.norm.weight.new_empty(
            (c.n_layer, 2, batch, c.n_kv_head, size, c.head_dim))
        self.size, self.length = size, 0        # places there are, and places filled
        self.tokens = None                      # (B, length) what they were filled from
        self.padding = None                     # (B,) places at the start that count for nothing

    def rewind(self, tokens, padding):
        """Keep what is there of tokens (B, T), the last of them excepted; forget the rest."""
        same = 0
        if self.tokens is not None and self.padding is None and not padding.any():
            n = min(self.length, self.tokens.shape[1], tokens.shape[1] - 1)
            same = (self.tokens[:, :n] == tokens[:, :n]).all(dim=0).cumprod(0).sum().item()
        self.length, self.padding = same, padding if padding.any() else None

    def seen(self, T: int):
        """Which places T new ones see, (B, 1, T, S). None: all up to their own, the usual case."""
        if self.padding is None:
            return None
        places = torch.arange(self.length + T, device=self.padding.device)              # (S,)
        own = places[self.length:, None]                                                # (T, 1)
        # Padding sees itself, because a softmax over nothing is not a number.
        return (places <= own) & ((places >= self.padding[:, None, None, None]) | (places == own))


def sample(logits, context, temperature: float, top_k: int | None, top_p: float | None,
           min_p: float | None, repetition_penalty: float, random):
    """Draw one token per row: logits (B, V), context (B, S), what was said -> ids (B,)."""
    if repetition_penalty != 1:         # arXiv:1909.05858, section 4.1
        said = logits.gather(1, context)
        said = torch.where(said > 0, said / repetition_penalty, said * repetition_penalty)
        logits = logits.scatter(1, context, said)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature     # no overflow to +inf
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:       # the nucleus, arXiv:1904.09751: always holds the likeliest token
        ordered, order = logits.softmax(dim=-1).sort(descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p      # enough came before this one
        # scatter puts the flags, which are in order of probability, back in the order of the ids.
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    if min_p:                   # arXiv:2407.01082; the likeliest has the logit 0
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=random)[:, 0]


def quantize(weight):
    """Matrix (out, in) -> (int8 of its shape, scale (out,)); row i is about scale[i] * int8[i].

    A row's largest number becomes 127. Nothing is calibrated, only weights change: the error is at
    most half a step, 1/254 of the row's largest number. To write one token every weight is read
    once, and memory is slower than arithmetic: so, about, half the bytes make half the time.
    """
    scale, small = weight.new_empty(len(weight)), torch.empty_like(weight, dtype=torch.int8)
    # Rows by the hundred, so that the copies in fp32 stay small.
    for rows, step, out in zip(weight.split(128), scale.split(128), small.split(128)):
        rows = rows.float()
        step.copy_(rows.abs().amax(dim=1).clamp(min=1e-12) / 127)
        out.copy_((rows / step[:, None]).round_().clamp_(-127, 127))
    return small, scale


# ---------------------------------------------------------------- files: config.json

# Our fields by the names that Hugging Face gives them, in the Llama family and in GPT-2.
HF_NAMES = dict(
    vocab_size=("vocab_size", "vocab_size"), block_size=("max_position_embeddings", "n_positions"),
    n_layer=("num_hidden_layers", "n_layer"), n_embd=("hidden_size", "n_embd"),
    n_head=("num_attention_heads", "n_head"), n_kv_head=("num_key_value_heads", None),
    head_dim=("head_dim", None), n_inner=("intermediate_size", "n_inner"),
    rope_theta=("rope_theta", None), rope_scaling=("rope_scaling", None),
    norm_eps=("rms_norm_eps", "layer_norm_epsilon"),
    tie_embeddings=("tie_word_embeddings", "tie_word_embeddings"))
# What a family has besides. It is written as it is; a file that says something else is refused,
# because to ignore it would give wrong answers.
HF_FIXED = dict(
    gpt2=dict(architectures=["GPT2LMHeadModel"], activation_function="gelu_new",
              scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
              add_cross_attention=False),
    llama=dict(architectures=["LlamaForCausalLM"], hidden_act="silu", attention_bias=False,
               mlp_bias=False),
    mistral=dict(architectures=["MistralForCausalLM"], hidden_act="silu", sliding_window=None),
    qwen2=dict(architectures=["Qwen2ForCausalLM"], hidden_act="silu", use_sliding_window=False),
    qwen3=dict(architectures=["Qwen3ForCausalLM"], hidden_act="silu", attention_bias=False,
               use_sliding_window=False))
# Inventions of other models. A file may have them only where they do nothing: null, false, 0 or 1.
HF_FOREIGN = ("num_experts", "num_local_experts", "n_routed_experts", "attn_logit_softcapping",
              "final_logit_softcapping", "logit_scale", "logits_scaling", "embedding_multiplier",
              "residual_multiplier", "attention_multiplier", "partial_rotary_factor",
              "rope_interleaved", "quantization_config")


def write_config(config: GPTConfig) -> dict:
    """The entries of a config.json."""
    old = config.family == "gpt2"
    entries = {names[old]: getattr(config, field) for field, names in HF_NAMES.items()
               if names[old]}
    return {"model_type": config.family} | entries | HF_FIXED[config.family]


def read_config(entries: dict) -> GPTConfig:
    """The entries of a config.json -> ours. ValueError for what the model can't honour."""
    family = entries.get("model_type") if isinstance(entries, dict) else None
    if family not in FAMILIES:
        raise ValueError(f"model_type is {family!r}; understood are {', '.join(FAMILIES)}")
    old = family == "gpt2"
    # Rotary positions: what transformers 5 has in one group stood in two places before.
    groups = [entries.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    if any(not isinstance(group, dict) for group in groups):
        raise ValueError(f"rope_parameters or rope_scaling is {groups}, not a group of entries")
    rope = {**groups[0], **groups[1]}
    entries = {"rope_theta": 10000.0} | entries | rope
    rope = {"rope_type": rope.get("rope_type", rope.get("type", "default"))} | rope
    entries["rope_scaling"] = None if rope["rope_type"] == "default" else {
        name: value for name, value in rope.items() if name not in ("type", "rope_theta")}

    for name in HF_FOREIGN:
        if entries.get(name) not in (None, False, 0, 1):
            raise ValueError(f"{name} is {entries[name]!r}; this model does not have that")
    if set(entries.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"layer_types is {entries['layer_types']!r}; only 'full_attention' is "
                         "understood")
    for name, value in HF_FIXED[family].items():
        if entries.get(name, value) != value and not (
                name == "sliding_window" and type(entries[name]) is int
                and entries[name] >= entries.get("max_position_embeddings", math.inf)):
            raise ValueError(f"{name} is {entries[name]!r}; only {value!r} is understood")

    # What a file means that does not say: for the rest it must.
    silent = dict(norm_eps=1e-5 if old else 1e-6, tie_embeddings=old, rope_scaling=None,
                  head_dim=128 if family == "qwen3" else None)
    if family == "llama":
        silent["n_kv_head"] = entries.get("num_attention_heads")
    if old:
        silent["n_inner"] = None
    fields = {"family": family}
    for field, names in HF_NAMES.items():
        name = names[old]
        if name is None:
            continue
        value = entries.get(name)
        if value is None and field in silent:
            value = silent[field]
        kind = {"rope_theta": float, "norm_eps": float, "tie_embeddings": bool,
                "rope_scaling": dict}.get(field, int)
        if type(value) is int and kind is float:
            value = float(value)
        if type(value) is not kind and not (value is None and field in silent):
            raise ValueError(f"{name} is {value!r}, not of type {kind.__name__}")
        fields[field] = value
    return GPTConfig(**fields)


# ---------------------------------------------------------------- files: GPT-2's names

GPT2_NAMES = (("wte", "embed_tokens"), ("wpe", "embed_positions"), ("h", "layers"),
              ("ln_1", "input_layernorm"), ("attn.c_proj", "self_attn.o_proj"),
              ("ln_2", "post_attention_layernorm"), ("mlp.c_fc", "mlp.up_proj"),
              ("mlp.c_proj", "mlp.down_proj"), ("ln_f", "norm"))


def from_gpt2(name: str, tensor) -> dict:
    """A tensor of GPT-2's files -> ours. Its layers' matrices are (in, out), those of q, k and v
    one: (C, 3 C). Old files also hold the causal mask, under the name of a bias."""
    name = name.removeprefix("transformer.")
    if name.endswith((".attn.bias", ".attn.masked_bias")):
        return {}
    for theirs, ours in GPT2_NAMES:
        name = re.sub(rf"\b{theirs}\.", ours + ".", name)
    if tensor.dim() == 2 and name.startswith("layers"):
        tensor = tensor.t().contiguous()
    if ".attn.c_attn." in name and tensor.dim():
        return {name.replace("attn.c_attn", f"self_attn.{which}_proj"): part
                for which, part in zip("qkv", tensor.chunk(3))}
    return {name: tensor}


def to_gpt2(tensors: dict) -> dict:
    """The way back, for all tensors."""
    theirs = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            tensor = torch.cat([tensors[name.replace("q_proj", f"{which}_proj")]
                                for which in "qkv"])
            name = name.replace("self_attn.q_proj", "attn.c_attn")
        if tensor.dim() == 2 and name.startswith("layers"):
            tensor = tensor.t()
        for new, ours in GPT2_NAMES:
            name = re.sub(rf"\b{ours}\.", new + ".", name)
        if ".k_proj." not in name and ".v_proj." not in name:
            theirs[name if name.startswith("lm_head") else f"transformer.{name}"] = tensor
    return theirs


# ---------------------------------------------------------------- files: safetensors

# https://github.com/huggingface/safetensors#format: 8 bytes with the length of a JSON header, the
# header {name: {dtype, shape, data_offsets}}, then the numbers. Nothing in it can be executed.
SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                     "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}


@contextmanager
def write_whole(path):
    """Open a file that appears under its name complete or not at all, whenever the power fails.

    It is written beside, forced to the disk and renamed; if anything goes wrong, what stood at
    `path` before still stands.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_safetensors(path, tensors: dict, metadata: dict):
    """Write named tensors, and metadata {str: str}, as one file. OSError if the disk is full."""
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)         # so that the numbers start at a multiple of 8
    with write_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def read_safetensors(path, adopt=lambda name, tensor: {name: tensor}) -> tuple[dict, dict]:
    """-> (tensors by name, metadata). The tensors are a private view of the file (copy-on-write):
    nothing is read before it is used, and what changes in memory does not change the file.

    adopt(name, tensor) may rename or change each; the view of what it replaced is given up at once,
    so that memory never holds both. ValueError if the file is damaged.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ValueError(f"{path} is damaged: it has {size} bytes")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        if start > size:
            raise ValueError(f"its header should be {start - 8} bytes long")
        header = json.loads(data[8:start])
        metadata = header.pop("__metadata__", {})
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = SAFETENSORS_TYPES.get(entry["dtype"]), entry["shape"]
            if dtype is None or not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError(f"{name} has the type {entry['dtype']} and the shape {shape}")
            # Each tensor begins where the last one ended and is as long as its shape says: no
            # two overlap, no byte is unaccounted for, none lies outside the file.
            count, begin = math.prod(shape), end
            end += count * dtype.itemsize
            if entry["data_offsets"] != [begin, end] or end > size - start:
                raise ValueError(f"{name} is not where its shape says, or the file ends before it")
            view = torch.empty(shape, dtype=dtype) if count == 0 else torch.frombuffer(
                data, dtype=dtype, count=count, offset=start + begin).view(shape)
            adopted = adopt(name, view)
            tensors |= adopted
            if all(tensor is not view for tensor in adopted.values()) and hasattr(data, "madvise"):
                page = (start + begin) // mmap.PAGESIZE * mmap.PAGESIZE
                data.madvise(mmap.MADV_DONTNEED, page, start + end - page)
        if end != size - start:
            raise ValueError(f"{size - start - end} bytes belong to no tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or of an unknown kind: {error}") from None
    return tensors, metadata


def read_model(directory: Path, adopt) -> dict:
    """All tensors of a model: of one file, or of the several that an index lists."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists():
        return read_safetensors(directory / "model.safetensors", adopt)[0]
    if not index.exists():
        raise ValueError(f"{directory} holds no model.safetensors (other kinds of files are not "
                         "opened: a pickle can run any code)")
    try:
        files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if any(Path(file).name != file for file in files):
            raise ValueError("it names files elsewhere")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {error}") from None
    tensors = {}
    for file in files:
        tensors |= read_safetensors(directory / file, adopt)[0]
    return tensors


# ---------------------------------------------------------------- what training needs

def pick_device(name: str | None = None) -> torch.device:
    """The device asked for, or the best one here; sets up its memory (see keep_freed_memory).
    Raises ValueError if it can't be used."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
            "cpu": True}
    name = name or next(kind for kind, works in here.items() if works)
    if not here.get(name):
        raise ValueError(f"device {name!r} is not available here; there is: "
                         + ", ".join(kind for kind, works in here.items() if works))
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def keep_freed_memory():
    """Tell glibc to keep large blocks that torch frees instead of handing them back to the kernel.

    A training step allocates the same hundreds of megabytes each time, and by default every one of
    those pages is returned, fetched and zeroed again: up to half of a step on a CPU. (mallopt(3):
    M_MMAP_MAX is -4, M_TRIM_THRESHOLD -1, M_TOP_PAD -2.) No other C library has it or needs it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option, value in (-4, 0), (-1, 2**31 - 1), (-2, 2**26):
        mallopt(option, value)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_dtype(device: torch.device, name: str | None = None) -> torch.dtype:
    """The type to multiply in: that of a name in DTYPES, or the best one. Weights stay in fp32.

    bf16 has the range of fp32 with 8 bits of precision: enough for products, and twice to ten times
    as fast where the hardware has it. fp16 has more precision and far less range, so that small
    gradients vanish unless the loss is scaled up first (train.py does it); it is for old GPUs.
    """
    if name:
        return DTYPES[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "mps":
        return torch.float32        # the only one that every Mac with a GPU multiplies well
    # A CPU without bf16 units emulates them, slowly, and does not say so: measuring tells.
    seconds = {}
    for dtype in torch.float32, torch.bfloat16:
        a = torch.ones(512, 512, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(lambda: a @ a, number=1, repeat=9))
    return min(seconds, key=seconds.get)


def make_optimizers(model, name: str, lr: float, weight_decay: float) -> list:
    """AdamW for all weights, or Muon for the layers' matrices and AdamW for the rest.

    AdamW (arXiv:1711.05101) divides each weight's averaged gradient by its own typical size. Weight
    decay pulls towards 0 what multiplies (matrices), not the scales of norms, which belong near 1.
    beta2 is 0.95 and not 0.999, so that the average of squared gradients can follow a run of
    hundreds of steps (GPT-3, arXiv:2005.14165, appendix B).

    Muon (arXiv:2502.16982) treats a matrix as one thing: it makes all directions of the averaged
    gradient equally strong, so that rare ones are learned as fast as common ones. Its update is
    scaled to the size of AdamW's (there, section 2.2), so that one --lr serves both.
    """
    hidden = []
    if name == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer 'muon' needs torch 2.9; this is {torch.__version__}")
        hidden = [w for w in model.layers.parameters() if w.dim() == 2]
    rest = [w for w in model.parameters() if all(w is not h for h in hidden)]
    groups = [{"params": [w for w in rest if w.dim() == 2], "weight_decay": weight_decay},
              {"params": [w for w in rest if w.dim() < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    return [adamw] if not hidden else [adamw, torch.optim.Muon(
        hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]


def learning_rate(step: int, peak: float, warmup_steps: int, max_steps: int) -> float:
    """Linear warm-up to `peak`, then half a cosine down to 0, in `max_steps` steps altogether.

    Warm-up, because AdamW's first averages rest on few gradients; decay, because near the end small
    steps average out the noise of the batches; down to 0 and not to a tenth, as many do, after
    arXiv:2502.15938 (which prefers a straight line).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def accumulate_gradients(forward, tokens, targets, micro_batch: int, device, autocast,
                         scaler) -> float:
    """Add the gradient of the whole batch to the weights' .grad; return its loss, nats per target.

    tokens, targets (B, T). micro_batch rows go through at once, to fit the memory. Each piece's
    mean loss counts by its share of the target tokens, so that the pieces add up to the mean over
    the whole batch whatever the cut; dividing by the number of pieces would not, as soon as they
    hold different numbers of targets. forward is the model, perhaps compiled.
    """
    count, loss = max(1, int((targets != -100).sum())), 0.0
    for x, y in zip(tokens.split(micro_batch), targets.split(micro_batch)):
        share = int((y != -100).sum()) / count
        with autocast():
            part = forward(x.to(device), y.to(device)) * share
        scaler.scale(part).backward()
        loss += part.detach()
    return loss.item()


def draw_losses(path, curves: dict[str, list[tuple[float, float]]], x_title: str, y_title: str):
    """Write {name: [(x, y), ...]} as a picture for any browser, on light and dark screens."""
    points = [point for curve in curves.values() for point in curve if math.isfinite(point[1])]
    if not points:
        return
    right = max(x for x, _ in points) or 1
    low, high = min(y for _, y in points), max(y for _, y in points)
    high = max(high, low + 1e-3)

    def place(x, y):
        return f"{60 + 520 * x / right:.1f},{20 + 300 * (high - y) / (high - low):.1f}"
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 370" '
             'font-family="sans-serif" font-size="12">',
             "<style>svg{background:#fff;color:#222}text{fill:currentColor}"
             ".c0{color:#3b7dd8}.c1{color:#d8643b}line{stroke:currentColor;opacity:.2}"
             "polyline{fill:none;stroke:currentColor;stroke-width:1.5}"
             "@media(prefers-color-scheme:dark){svg{background:#161616;color:#ddd}}</style>"]
    for i in range(5):          # five grid lines each way, with the number they stand for
        x, y = right * i / 4, low + (high - low) * i / 4
        left, bottom = place(0, y).split(","), place(x, low).split(",")
        parts += [f'<line x1="60" x2="580" y1="{left[1]}" y2="{left[1]}"/>',
                  f'<text x="54" y="{float(left[1]) + 4}" text-anchor="end">{y:.2f}</text>',
                  f'<text x="{bottom[0]}" y="338" text-anchor="middle">{x:,.0f}</text>']
    for i, (name, curve) in enumerate(curves.items()):
        line = " ".join(place(x, y) for x, y in curve if math.isfinite(y))
        parts += [f'<polyline class="c{i % 2}" points="{line}"/>',
                  f'<text x="574" y="{36 + 18 * i}" text-anchor="end" class="c{i % 2}">'
                  f'{name} {curve[-1][1]:.3f}</text>' if curve else ""]
    parts += [f'<text x="320" y="360" text-anchor="middle">{x_title}</text>',
              '<text transform="translate(14 170) rotate(-90)" text-anchor="middle">'
              f"{y_title}</text>", "</svg>"]
    with write_whole(path) as file:
        file.write("\n".join(parts).encode())
