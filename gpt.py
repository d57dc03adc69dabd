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
import argparse
import ctypes
import hashlib
import json
import math
import mmap
import os
import re
import shlex
import signal
import subprocess
import sys
import time
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
        # To write one token, every weight is read once, and memory is slower than arithmetic: what
        # counts is how fast a CPU gets through the bytes of W.
        alone = x.is_cpu and x.numel() == x.shape[-1] and not x.requires_grad
        if alone and torch.compiler.is_compiling():     # inductor makes this one tight loop
            y = (self.weight.float() * x.float().view(-1)).sum(-1)
            y = (y if self.scale is None else y * self.scale).to(x.dtype).view(*x.shape[:-1], -1)
        elif alone and self.scale is not None:          # the same, ready-made; a little slower
            y = torch.ops.aten._weight_int8pack_mm(x.view(1, -1), self.weight, self.scale)
            y = y.view(*x.shape[:-1], -1)
        elif self.scale is not None:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        else:
            return F.linear(x, self.weight, self.bias)
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
        if x.is_cpu and x.requires_grad:
            return RMSNormByHand.apply(x, self.weight, self.eps)
        # The weight in the type of x: torch has one fused kernel for that, none for mixed types.
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class RMSNormByHand(torch.autograd.Function):
    """The same for training on a CPU. There torch has no kernel for the backward pass, but goes
    through it operation by operation: in twice the time, and keeping two copies of x in fp32."""

    @staticmethod
    def forward(ctx, x, weight, eps: float):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()         # 1 / rms
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_y):
        x, weight, scale = ctx.saved_tensors
        unit = x * scale                        # y = weight * unit; its rms is 1 ...
        by_unit = by_y * weight.to(scale.dtype)
        # ... whatever x is, so what the gradient has in its direction is taken out.
        by_x = (by_unit - unit * (by_unit * unit).mean(-1, keepdim=True)).mul_(scale)
        return by_x.to(x.dtype), (by_y * unit).flatten(0, -2).sum(0), None


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
    if q.is_cpu and q.dtype == torch.bfloat16 and seen is None and 1 < T == S <= 512:
        # On a CPU torch's fused kernel is not at home in bf16: its backward pass does not use the
        # bf16 units, and plain products take half its time, forward a tenth less (up to some
        # length: they store T x T scores). The queries of a group stand below each other, so that
        # their keys need not be copied: (B, K, H/K T, D) @ (B, K, D, T).
        scores = (q * D**-0.5).reshape(B, K, -1, D) @ k.mT
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores = scores.view(B, K, -1, T, T).masked_fill_(future, -math.inf)
        # Autocast would copy the scores to fp32; the bf16 softmax adds up in fp32 as it is.
        with torch.autocast("cpu", enabled=False):
            weights = scores.softmax(dim=-1)
        return (weights.view(B, K, -1, T) @ v).view(B, H, T, D)
    if T == B == 1 and torch.compiler.is_compiling() and q.is_cpu and not q.requires_grad:
        # One query, in a loop that inductor writes: (K, H/K, 1, D) times (K, 1, S, D), and so on.
        weights = (q.view(K, -1, 1, D).float() * k[0, :, None]).sum(-1).mul(D**-0.5).softmax(-1)
        return (weights[..., None] * v[0, :, None]).sum(2).to(q.dtype).view(B, H, T, D)
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
        """x (B, T, C) -> (B, T, C). past: keys and values of all S places (2, B, K, S, D), of which
        the last T are still to be filled, and Cache.seen. lengths: see GPT.forward."""
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
            past, seen = past
            past[0, :, :, -T:], past[1, :, :, -T:] = k, v
            k, v = past                                                    # -> (B, K, S, D)
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


def product_dtype(x) -> torch.dtype:
    """In which x will be multiplied by weights: that of autocast, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class TokenLoss(torch.autograd.Function):
    """-ln p of each target: logits (N, V), targets (N,) -> (N,), nats. A target of -100 (torch's
    default `ignore_index`) costs 0.

    p is softmax(logits), and the gradient by the logits is p, less 1 at the target. Both in fp32: a
    sum over V terms in bf16 would lose the small ones. But in small pieces, which fit a cache; and
    the gradient is written over the logits. So there is one copy of them, where autograd alone
    would need four.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.rows = max(1, (2**22 if logits.is_cpu else 2**26) // logits.shape[1])
        wide = torch.promote_types(logits.dtype, torch.float32)
        parts = zip(logits.split(ctx.rows), targets.split(ctx.rows))
        losses = torch.cat([F.cross_entropy(part.to(wide), ids, reduction="none")
                            for part, ids in parts])
        ctx.save_for_backward(logits, targets, losses)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_losses):
        logits, targets, losses = ctx.saved_tensors
        by_losses = by_losses.masked_fill(targets == -100, 0)[:, None]
        ids = targets.clamp(min=0)[:, None]                         # (N, 1), as all here
        log_sum = losses[:, None] + logits.gather(1, ids)           # ln of the sum of exp(logits)
        for part, *rows in zip(*(of.split(ctx.rows) for of in (logits, ids, log_sum, by_losses))):
            ids, log_sum, by_loss = rows
            p = (part - log_sum).exp_()
            part.copy_(p.scatter_add_(1, ids, -torch.ones_like(log_sum)).mul_(by_loss))
        return logits, None


def cross_entropy(x, head: Linear, targets):
    """TokenLoss of the logits that `head` makes of x, (N, C).

    The logits of all N places would be the largest thing in memory by far. If they are more than
    128 MB (GPU: 512), they are made in pieces, which are forgotten and made again in the backward
    pass.
    """
    def piece(x, targets):
        return TokenLoss.apply(head(x), targets)
    row = len(head.weight) * product_dtype(x).itemsize      # bytes
    size = max(1, (2**27 if x.is_cpu else 2**29) // row)
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
        self.compiled = None        # see compile_decoding
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
            return losses.view(targets.shape).clone()       # FSDP wants no views
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
        elif (end := start + (T if lengths is None else max(lengths))) > self.config.block_size:
            raise ValueError(f"{end} places; this model has learned {self.config.block_size} "
                             "positions")
        else:
            x = x + self.embed_positions.rows(positions)
        # What the layers add is in this type anyway; the sum in it halves the memory traffic.
        x = x.to(product_dtype(x))
        seen = None if cache is None else cache.seen(T)
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, angles, None, lengths, use_reentrant=False)
            else:
                past = None if cache is None else (cache.memory[i, :, :, :, :start + T], seen)
                if self.compiled and B == T == 1 and start:
                    torch._dynamo.mark_dynamic(past[0], 3)      # S grows from call to call
                    x = self.compiled[0](layer, x, angles, past)
                else:
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

    def flops_per_token(self, T: int | None = None) -> int:
        """Forward and backward, floating-point operations, in rows of T tokens (or block_size).

        Each weight of a matrix is one multiply-add forward and two backward: 6 operations. An input
        embedding is a look-up and costs nothing, but the output matrix does. Per head, q k^T and
        weights @ v are 2 D T operations a token each, three times that with backward: 12 H D T a
        layer (arXiv:2204.02311, appendix B; like there, the masked half is counted).
        """
        c = self.config
        matrices = sum(w.numel() for w in self.layers.parameters() if w.dim() == 2)
        return 6 * (matrices + self.head.weight.numel()) + (
            12 * c.n_layer * c.n_head * c.head_dim * (T or c.block_size))

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
        x = self.hidden(tokens[:, None], cache)[:, 0]
        return self.compiled[1](self.head, x) if self.compiled and len(x) == 1 else self.head(x)

    def compile_decoding(self):
        """Let torch.compile make one loop of each layer, for decoding a single row on a CPU: about
        three times as fast in bf16, twice in int8. Needs a C++ compiler, and ten seconds at the
        first token; later processes find the result on the disk."""
        # Norms are computed once and not again for each row of the matrices that read them.
        options = {"realize_acc_reads_threshold": 2}
        self.compiled = [torch.compile(function, fullgraph=True, options=options)
                         for function in (Block.forward, Linear.forward)]
        return self

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

    def save_pretrained(self, directory, weights: dict | None = None, **extra):
        """Write config.json and model.safetensors, the layout of the family at Hugging Face.

        weights: to write instead of its own. extra: more entries for config.json, such as
        eos_token_id. Each file is replaced whole.
        """
        if self.head.scale is not None:
            raise ValueError("int8 is for generation only: other programs can't open such files")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = self.state_dict() if weights is None else weights
        dtype = str(tensors["norm.weight"].dtype).removeprefix("torch.")
        if self.config.family == "gpt2":
            tensors = to_gpt2(tensors)
        else:
            tensors = {name if name.startswith("lm_head") else f"model.{name}": weight
                       for name, weight in tensors.items()}
        write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
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


# ---------------------------------------------------------------- training: the machine

# From here on: what train.py and finetune.py share. Who wants only the model may stop reading.

def pick_device(name: str | None = None) -> torch.device:
    """The device asked for, or the best one here; sets up its memory (see keep_freed_memory).
    Raises ValueError if it can't be used. torchrun gives each process a GPU of its own."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
            "cpu": True}
    name = name or next(kind for kind, works in here.items() if works)
    if not here.get(name):
        raise ValueError(f"device {name!r} is not available here; there is: "
                         + ", ".join(kind for kind, works in here.items() if works))
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
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
    gradients vanish unless the loss is scaled up first (GradScaler in fit); it is for old GPUs.
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
    faster = add_up(seconds[torch.bfloat16] < seconds[torch.float32])       # all choose the same
    return torch.bfloat16 if 2 * faster > process_count() else torch.float32


# Products a second in bf16 or fp16, without sparsity, by NVIDIA's data sheets.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
              "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12,
              "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the device could do at best, per second; None where no data sheet is known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


# ---------------------------------------------------------------- training: many processes

# torchrun starts a script several times, once for each GPU, and tells each its number (RANK) in the
# environment. All have the same weights, compute the gradient of their own share of each batch, and
# add these up: then all take the same step. With one process, these functions do nothing.

def join_processes(device: torch.device) -> int:
    """Meet the other processes, if torchrun started any. -> this one's number, from 0."""
    if "RANK" not in os.environ:
        return 0
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if process_number():        # one speaks for all
        sys.stdout = open(os.devnull, "w")
    return process_number()


def process_count() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def process_number() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def add_up(number: float) -> float:
    """The sum over all processes. They wait here for each other."""
    if process_count() == 1:
        return float(number)
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(float(number), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.item()


def shard(model):
    """FSDP2 (arXiv:2304.11277): each process keeps its part of every weight, gradient and optimizer
    state; a layer's weights are put together when their turn comes, and let go. For models that
    don't fit one device."""
    from torch.distributed.fsdp import fully_shard
    for layer in model.layers:
        fully_shard(layer)
    # True, which is not the default of the outermost: else its weights would still be whole after
    # an evaluation, and an optimizer made then would hold copies that are about to be thrown away.
    fully_shard(model, reshard_after_forward=True)


def whole(tensor):
    """The tensor of which a process may hold only a part. All processes must ask together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_like(tensor, weight):
    """The other way: of a whole tensor the part that this process keeps of `weight`."""
    if not hasattr(weight, "placements") or tensor.shape != weight.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(weight.device), weight.device_mesh, weight.placements)


# ---------------------------------------------------------------- training: an order for the data

def mix(*numbers: int) -> int:
    """A number below 2^63 for each tuple of numbers: random-looking, and the same everywhere."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def shuffled(i: int, n: int, *key: int) -> int:
    """Where i goes in the key's shuffle of range(n), without a table of n entries.

    A Feistel network: the halves of i's bits are mixed into each other in turn, which could be
    undone step by step, so no two i meet. It shuffles the numbers below the next power of 4; one
    that lands at n or above is shuffled again.
    """
    half = (max(1, (n - 1).bit_length()) + 1) // 2
    while True:
        left, right = i >> half, i & ((1 << half) - 1)
        for turn in range(4):
            left, right = right, left ^ (mix(right, turn, *key) & ((1 << half) - 1))
        i = left << half | right
        if i < n:
            return i


# ---------------------------------------------------------------- training: one step

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
    hidden, weights = [], [w for w in model.parameters() if w.requires_grad]
    if name == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer 'muon' needs torch 2.9; this is {torch.__version__}")
        hidden = [w for w in model.layers.parameters() if w.dim() == 2]
    rest = [w for w in weights if all(w is not h for h in hidden)]
    groups = [{"params": [w for w in rest if w.dim() == 2], "weight_decay": weight_decay},
              {"params": [w for w in rest if w.dim() < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    return [adamw] if not hidden else [adamw, torch.optim.Muon(
        hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]


def learning_rate(step: int, peak: float, warmup_steps: int, max_steps: int,
                  schedule: str = "cosine") -> float:
    """Linear warm-up to `peak`; then half a cosine down to 0 ("cosine"), or `peak` until the last
    fifth of the run and a straight line down to 0 ("wsd": warm-up, stable, decay).

    Warm-up, because AdamW's first averages rest on few gradients; decay, because near the end small
    steps average out the noise of the batches; down to 0 and not to a tenth, as many do, after
    arXiv:2502.15938. wsd (arXiv:2404.06395, section 4; a fifth: arXiv:2405.18392) ends as well as
    the cosine, and until the decay begins a run may still be made longer.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    if schedule == "wsd":
        return peak * min(1.0, 5 * (1 - progress))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def accumulate_gradients(model, share_of, rows: int, micro_batch: int, scaler) -> tuple[float, int]:
    """Add the gradient of this process's rows to the weights' .grad, in pieces that fit the memory.

    share_of(first, last) is what those rows add to the loss of the whole batch: the sum over their
    targets, divided by the number of targets in all rows of all processes. So the pieces add up to
    the mean over the batch however it is cut; to average the means of the pieces would not, as soon
    as they hold different numbers of targets.
    Where memory runs out, the pieces are halved and the step is begun again.
    -> (the rows' share of the loss, the size of pieces that fitted).
    """
    sharded = hasattr(model, "set_requires_gradient_sync")
    # FSDP averages gradients over the processes as they are made; this makes it a sum.
    scale = process_count() if sharded else 1
    while True:
        try:
            loss = 0.0
            for first in range(0, rows, micro_batch):
                part = share_of(first, min(first + micro_batch, rows))
                scaler.scale(part * scale).backward()
                loss += part.detach()
            return float(loss), micro_batch
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not re.search(
                    "out of memory|allocate memory|enough memory", str(error)):
                raise
        # Under FSDP the processes compute in step: one alone can't begin again.
        if micro_batch == 1 or sharded:
            raise ValueError("out of memory: try a smaller --micro_batch or --block_size, or a "
                             "smaller model")
        model.zero_grad()
        micro_batch //= 2
        print(f"\nout of memory; from now on {micro_batch} rows at once", flush=True)


def update(model, optimizers, scaler, grad_clip: float) -> float:
    """One step by the gradients of all processes, which are then forgotten. -> their norm, before
    it was clipped; where that is not finite, the weights stay as they are."""
    if process_count() > 1 and not hasattr(model, "set_requires_gradient_sync"):
        # What DistributedDataParallel does alongside the last backward pass. Here it comes after
        # it: a process that ran out of memory can begin again without asking the others.
        for waiting in [torch.distributed.all_reduce(weight.grad, async_op=True)
                        for weight in model.parameters() if weight.grad is not None]:
            waiting.wait()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)).item()
    if math.isfinite(grad_norm):
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()
    model.zero_grad()
    return grad_norm


# ---------------------------------------------------------------- training: the files of a run

def save_run(out: Path, model, weights: dict, optimizers, notes: dict, extra: dict, rank: int):
    """Replace the checkpoint, then the model for others, each in one step. Raises OSError.

    trainer_state.safetensors holds all that resuming needs, the weights too, so that a kill between
    the two does no harm: model.safetensors is one save behind at worst. All processes bring their
    parts of the optimizers' state, the first one writes.
    """
    tensors = {f"model.{name}": weight for name, weight in weights.items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": whole(value)
                        for key, value in state.items()}
    if rank == 0:
        write_safetensors(out / "trainer_state.safetensors", tensors,
                          {name: json.dumps(value) for name, value in notes.items()})
        model.save_pretrained(out, weights, **extra)
        draw_losses(out)


def open_for_training(directory, dropout: float) -> GPT:
    """A model that there is, in fp32 and in memory of its own: see restore_run for the reason."""
    model = GPT.from_pretrained(directory, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


def restore_run(tensors: dict, model, optimizers):
    """Put a checkpoint back, whole or in parts. Tensors are copied, because a product of matrices
    can differ in the last bit with the alignment of its memory, and views of a file are aligned
    otherwise."""
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            weight.copy_(part_like(tensors[f"model.{name}"], weight))
    for number, optimizer in enumerate(optimizers):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        state = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                *_, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = part_like(
                    tensor.clone(), weights[int(index)])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def copy_tokenizer(folder: Path, out: Path) -> dict:
    """Put the tokenizer beside the model; return what config.json says of it ({}: none there)."""
    if not (folder / "tokenizer_config.json").exists():
        return {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with write_whole(out / name) as file:
            file.write((folder / name).read_bytes())
    names = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    extra = {f"{kind}_token_id": ids[names[f"{kind}_token"]] for kind in ("bos", "eos")
             if names.get(f"{kind}_token") in ids}
    with write_whole(out / "generation_config.json") as file:
        file.write(json.dumps(extra, indent=2).encode())
    return extra


def rewind(metrics: Path, step: int):
    """Drop the lines after `step`: a killed run has measured what it then lost."""
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with write_whole(metrics) as file:
            file.write("".join(kept).encode())


def draw_losses(out: Path):
    """OUT/loss.svg, for any browser, on light and dark screens: "loss" and "val_loss" of
    OUT/metrics.jsonl over the steps."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    curves = {name: [(row["step"], row[key]) for row in rows if row.get(key) is not None]
              for name, key in (("training", "loss"), ("held out", "val_loss"))}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return
    right = max(x for x, _ in points) or 1
    low, high = min(y for _, y in points), max(y for _, y in points)
    high = max(high, low + 1e-3)

    def place(x, y):
        return round(60 + 520 * x / right, 1), round(20 + 300 * (high - y) / (high - low), 1)
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 370" '
             'font-family="sans-serif" font-size="12">',
             "<style>svg{background:#fff;color:#222}text{fill:currentColor}"
             ".c0{color:#3b7dd8}.c1{color:#d8643b}line{stroke:currentColor;opacity:.2}"
             "polyline{fill:none;stroke:currentColor;stroke-width:1.5}"
             "@media(prefers-color-scheme:dark){svg{background:#161616;color:#ddd}}</style>"]
    for i in range(5):          # five grid lines, with the numbers they stand for on both axes
        left, bottom = right * i / 4, low + (high - low) * i / 4
        x, y = place(left, bottom)
        parts += [f'<line x1="60" x2="580" y1="{y}" y2="{y}"/>',
                  f'<text x="54" y="{y + 4}" text-anchor="end">{bottom:.2f}</text>',
                  f'<text x="{x}" y="338" text-anchor="middle">{left:,.0f}</text>']
    for i, (name, curve) in enumerate(curves.items()):
        line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in curve))
        parts += [f'<polyline class="c{i}" points="{line}"/>',
                  f'<text x="574" y="{36 + 18 * i}" text-anchor="end" class="c{i}">'
                  f'{name} {curve[-1][1]:.3f}</text>' if curve else ""]
    parts += ['<text x="320" y="360" text-anchor="middle">step</text>',
              '<text transform="translate(14 170) rotate(-90)" text-anchor="middle">'
              "loss, nats per token</text>", "</svg>"]
    with write_whole(out / "loss.svg") as file:
        file.write("\n".join(parts).encode())


# ---------------------------------------------------------------- training: the flags of a run

def wrong_flag(message: str):
    """argparse would print its whole usage; one line is what a person reads."""
    raise ValueError(f"{message}; see --help")


def add_flags(parser: argparse.ArgumentParser):
    """The flags that train.py and finetune.py have in common; what they set by default differs."""
    parser.error = wrong_flag
    add = parser.add_argument_group("optimisation").add_argument
    add("--micro_batch", default="auto", help="rows computed at once, or auto: many, and fewer "
        "when memory runs out; the optimisation stays the same [%(default)s]")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon learns more from "
        "each batch, and needs torch 2.9 [%(default)s]")
    add("--schedule", choices=("cosine", "wsd"), default="cosine", help="how the learning rate "
        "falls: all the way, or in the last fifth [%(default)s]")
    add("--weight_decay", type=float, default=0.1, help="of the matrices, times the learning rate "
        "[%(default)s]")
    add("--warmup_steps", type=int, default=30, help="steps until --lr is reached [%(default)s]")
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; a longer one "
        "is scaled down to it [%(default)s]")
    add("--dropout", type=float, default=0.0, help="raise it when a small text is seen many times "
        "and the held-out loss turns upwards [%(default)s]")
    add("--seed", type=int, default=1, help="of first weights, batches, dropout [%(default)s]")
    add = parser.add_argument_group("running").add_argument
    add("--out", metavar="DIR", help="where the run goes [out/NAME, numbered if taken]")
    add("--resume", action="store_true", help="go on with the run in --out [the newest one]")
    add("--device", choices=("cpu", "cuda", "mps"), help="[the fastest one here]")
    add("--dtype", choices=tuple(DTYPES), help="of products [the best one here]")
    add("--fsdp", action="store_true", help="under torchrun: divide the weights among the "
        "processes, for a model larger than one device")
    add("--eval_every", type=int, help="steps between evaluations [a tenth of the run]")
    add("--save_every", type=int, help="steps between checkpoints [as --eval_every]")
    add("--log_every", type=int, default=10, help="steps between log lines [%(default)s]")


# What a resumed run may change: nothing that would make it another run than the one that stopped,
# but for its length (which moves the learning rate from then on) and where and how it computes.
MAY_CHANGE = {"out", "resume", "max_steps", "epochs", "micro_batch", "device", "dtype", "compile",
              "recompute", "fsdp", "eval_every", "eval_tokens", "save_every", "log_every"}


def read_flags(parser: argparse.ArgumentParser, argv) -> tuple:
    """Flags -> (settings, tensors of the run to resume or None, what that run noted).

    Paths become whole, so that a run can be resumed from another folder. ValueError, one line, for
    what can be seen to be wrong without the data.
    """
    def parse():
        args = parser.parse_args(argv)
        for name in "data", "val_data", "model":
            value = getattr(args, name, None)
            if value:
                setattr(args, name, [str(Path(path).resolve()) for path in value]
                        if isinstance(value, list) else str(Path(value).resolve()))
        return args
    args, tensors, noted, script = parse(), None, {}, parser.prog
    if args.resume:
        states = sorted(Path("out").glob("*/trainer_state.safetensors"),
                        key=lambda file: file.stat().st_mtime)
        out = Path(args.out) if args.out else states[-1].parent if states else Path("out")
        if not (out / "trainer_state.safetensors").is_file():
            raise ValueError(f"nothing to resume: {out} holds no trainer_state.safetensors")
        tensors, noted = read_safetensors(out / "trainer_state.safetensors")
        noted = {name: json.loads(text) for name, text in noted.items()}
        if noted.get("script") != script:
            raise ValueError(f"{out} is not a run of {script}, but of {noted.get('script')}")
        parser.set_defaults(**noted["args"])    # a flag given again wins over the saved value
        args = parse()
        args.out = str(out)
        for name, value in noted["args"].items():
            if name not in MAY_CHANGE and getattr(args, name) != value:
                raise ValueError(f"--{name} was {value} in {out} and can't become "
                                 f"{getattr(args, name)} now: leave it out, or start a new run")
    if args.val_data and not args.data:
        raise ValueError("--val_data without --data: the plays have held-out ones of their own")
    if args.fsdp and args.optimizer == "muon":
        raise ValueError("--fsdp cuts matrices in parts, and muon needs them whole: use adamw")
    if args.micro_batch != "auto":
        if not str(args.micro_batch).isdecimal():
            raise ValueError(f"--micro_batch is {args.micro_batch}; it must be a number or auto")
        args.micro_batch = int(args.micro_batch)
    for name, value in vars(args).items():      # what counts or scales is above 0
        if type(value) in (int, float) and not value > 0 and name not in (
                "seed", "dropout", "weight_decay", "warmup_steps", "label_smoothing", "lora"):
            raise ValueError(f"--{name} is {value}; it must be above 0")
    return args, tensors, noted


def out_folder(args, name: str) -> Path:
    """Where the run goes. A new run never overwrites an old one."""
    out, number = Path(args.out or f"out/{name}"), 2
    while not args.out and out.exists():
        out, number = Path(f"out/{name}-{number}"), number + 1
    if not args.resume and any(out.glob("*.safetensors")):
        raise ValueError(f"{out} holds a model: go on with it by --resume, or choose another --out")
    return out


def nearby(path: Path) -> Path:
    """The short way to write a path, where there is one."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def run(script: str, *arguments):
    """Run another script of this project, after printing the command. Its errors are its own."""
    script, arguments = Path(__file__).resolve().parent / script, list(map(str, arguments))
    print("$ python " + shlex.join([str(nearby(script)), *arguments]), flush=True)
    code = subprocess.run([sys.executable, str(script), *arguments]).returncode
    if code:
        sys.exit(code)


def exit_code(script: str, story, argv) -> int:
    """Run story(argv), which returns an exit code; what goes wrong becomes a line and a code."""
    try:
        return story(argv)
    except (ValueError, OSError) as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:       # before the first step, or asked for twice
        print("\ninterrupted; the last checkpoint, if there is one, stands", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- training: the loop

def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def fit(args, out: Path, model, dtype, learn, evaluate, tensors, noted: dict, notes: dict,
        tokenizer: Path) -> int:
    """Train `model` from step 0, or from where `tensors` and `noted` (see read_flags) left it.

    learn(step, scaler) adds the gradient of this process's share of a batch to the weights' .grad
    and returns what to log of the whole batch: "loss", "tokens" and "flops" at least; "more", if
    there, is a dict of what is logged, but not printed.
    evaluate(last) returns what to log of the held-out data, "val_loss" at least ("comparable", if
    that one was computed on more than usual), and words for it. `notes` is kept for the one who
    resumes; `tokenizer` is the folder with the model's. Returns the exit code: 0, or 128 + the
    number of the signal that stopped the run; 2 if the last save failed.
    """
    rank, device = process_number(), next(model.parameters()).device
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, tokens, seconds_before, best, skipped = 0, 0, 0.0, math.inf, 0
    if tensors:
        restore_run(tensors, model, optimizers)
        tensors.clear()     # lets go of the file, which is about to be replaced
        if noted["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(noted["scaler"])
        step, tokens, seconds_before = noted["step"], noted["tokens"], noted["seconds"]
        best = noted["best"] or math.inf
    args.eval_every = args.eval_every or max(1, math.ceil(args.max_steps / 10))
    args.save_every = args.save_every or args.eval_every
    peak = peak_flops(device, dtype)

    # From here on things are written, by the first process.
    extra, metrics = {}, open(os.devnull, "w")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        extra = copy_tokenizer(tokenizer, out)
        rewind(out / "metrics.jsonl", step)
        metrics = open(out / "metrics.jsonl", "a", encoding="utf-8", buffering=1)   # whole lines
    stopped_by = []         # filled by a signal, looked at once a step

    def stop(number, frame):
        if stopped_by:
            raise KeyboardInterrupt     # asked twice: at once
        stopped_by.append(number)
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    # On a terminal the line of a step replaces the one before.
    again, newline, end = ("\r", "\n", "") if sys.stdout.isatty() else ("", "", "\n")
    begin = since = time.perf_counter()
    since_step, since_tokens, flops, stopping = step, tokens, 0, 0
    model.train()

    while step < args.max_steps and not stopping:
        # ---- One step. Dropout, too, is a function of the step.
        torch.manual_seed(mix(args.seed, step, rank))
        lr = learning_rate(step, args.lr, args.warmup_steps, args.max_steps, args.schedule)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        learned = learn(step, scaler)
        grad_norm = update(model, optimizers, scaler, args.grad_clip)
        step, tokens = step + 1, tokens + learned.pop("tokens")
        flops, more = flops + learned.pop("flops"), learned.pop("more", {})
        skipped = 0 if math.isfinite(grad_norm) else skipped + 1
        if skipped:     # to take such a step would ruin the weights
            print(f"{newline}step {step}: the gradient is not finite, weights left as they are "
                  f"({skipped} in a row)")
        if skipped == 20:
            raise ValueError("20 such steps in a row: try a lower --lr, or --dtype fp32")

        # ---- Once in a while: say where we are, evaluate, save.
        last, stopping = step == args.max_steps, add_up(len(stopped_by))    # all stop, or none
        evaluating = last or step % args.eval_every == 0
        saving = last or stopping or step % args.save_every == 0
        logging = evaluating or step % args.log_every == 0
        now = time.perf_counter()
        row = {"step": step, "tokens": tokens, "seconds": round(seconds_before + now - begin, 3),
               **learned, **more, "lr": lr, "grad_norm": grad_norm}
        if logging:
            words = "  ".join(f"{name} {value:.4f}" for name, value in learned.items())
            if peak:        # model FLOPs utilisation: arXiv:2204.02311, appendix B
                row["mfu"] = flops / (now - since) / peak / process_count()
                words += f"  MFU {row['mfu']:.1%}"
            print(f"{again}step {step:>5}/{args.max_steps}  {words}  lr {lr:.2e}  grad_norm "
                  f"{grad_norm:5.2f}  {(tokens - since_tokens) / (now - since):>7,.0f} tokens/s  "
                  f"{clock((args.max_steps - step) * (now - since) / (step - since_step))} left ",
                  end=end, flush=True)
        better = False
        if evaluating:
            model.eval()
            found, words = evaluate(last)
            model.train()
            loss = found.pop("comparable", found["val_loss"])
            better, best = loss < best, min(loss, best)
            row |= found
            print(f"{newline}step {step:>5}  held out: {words}", flush=True)
        try:
            if logging:     # JSON has no nan
                metrics.write(json.dumps({key: value if math.isfinite(value) else None
                                          for key, value in row.items()}) + "\n")
            if saving or better:
                weights = {name: whole(weight) for name, weight in model.state_dict().items()}
            if better and rank == 0:
                model.save_pretrained(out / "best", weights, **extra)
                copy_tokenizer(tokenizer, out / "best")
            if saving:
                save_run(out, model, weights, optimizers, notes | {
                    "args": vars(args), "step": step, "tokens": tokens, "seconds": row["seconds"],
                    "best": best if math.isfinite(best) else None,
                    "scaler": scaler.state_dict()}, extra, rank)
        except OSError as error:
            print(f"{newline}could not write all of {out}, where the last whole checkpoint still "
                  f"stands: {error}", flush=True)
            if last or stopping:
                return 2
        if logging or saving:
            since, since_step, since_tokens, flops = time.perf_counter(), step, tokens, 0

    for number, handler in handlers.items():
        signal.signal(number, handler)
    if step < args.max_steps:
        print(f"{newline}stopped after step {step}, which is saved; to go on:\n"
              f"    python {notes['script']} --resume --out {shlex.quote(str(out))}")
        return 128 + (stopped_by or [signal.SIGTERM])[0]
    return 0
