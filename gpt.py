# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "numpy"]
# ///
"""The decoder transformer: the model of every script here, in one file.

    from gpt import GPT, GPTConfig
    model = GPT(GPTConfig(n_layer=4, vocab_size=4096))      # random weights
    logits = model(tokens)                                  # (B, T) ids -> (B, T, V) scores
    loss = model(tokens, targets)                           # nats per target token
    for ids in model.generate(tokens, 100): ...             # (B,) new ids, step by step
    model.save_pretrained("out/mine")                       # opens in transformers, too
    model = GPT.from_pretrained("out/mine")                 # or a download from a model hub

A language model assigns, at every position in a text, a probability to each possible next token.
Each token first becomes a vector, its row of a matrix. Layers then alternate between mixing vectors
across positions (Attention) and transforming each vector by itself (MLP). A last matrix turns each
vector into V scores, the logits; their softmax is the probabilities. GPT-2, Llama, Mistral, Qwen 2
and Qwen 3 are this with a few parts swapped. The default is Qwen 3, with its parts and the names of
its weights, so what is trained here opens elsewhere unchanged. Left out on purpose: mixtures of
experts, sliding windows, most ways to scale rotary positions. A config.json with an entry that
would change the output and is not implemented is refused, with its name.

Reading order: configuration, parts, model; there the transformer is complete, in plain PyTorch.
Then generation; the same function in less time or memory; files; and what only training needs.
Letters, in all files: B rows in a batch; T positions in a row; S visible positions, these T and all
before them; C width (n_embd); H query heads (n_head); K key-value heads (n_kv_head); D width of a
head (head_dim); V vocabulary (vocab_size).
"""
import ctypes
import json
import math
import mmap
import os
import re
import sys
import timeit
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint import state_dict as full_states

# ---------------------------------------------------------------- configuration

@dataclass
class GPTConfig:
    """The shape of a model; the parts are by default those of Qwen 3. What is None is derived.
    Raises ValueError, one line, when the numbers do not fit each other."""
    vocab_size: int = 4096          # V
    block_size: int = 256           # the longest row that the model is trained on, in tokens
    n_layer: int = 4                # the one dial: deeper models are also wider
    n_embd: int | None = None       # C; 64 per layer
    n_head: int | None = None       # H; one for every 64 of the width, as in GPT-2
    n_kv_head: int | None = None    # K; one for every two query heads, which halves the KV cache
    head_dim: int | None = None     # D; n_embd / n_head
    n_inner: int | None = None      # width in the MLP: 4 n_embd; if gated, 8/3 n_embd
    norm: str = "rms"               # or "layer"
    norm_eps: float = 1e-6
    positions: str = "rotary"       # or "learned"
    rope_theta: float = 10000.0     # rotary positions: the slowest pair turns once in ~2 pi this
    rope_scaling: dict | None = None    # how rows longer than those of the training are read
    gated_mlp: bool = True          # SwiGLU or, if False, GELU
    qk_norm: bool = True            # norms on queries and keys
    qkv_bias: bool = False          # biases where queries, keys and values are computed,
    o_bias: bool = False            # in the output of attention,
    mlp_bias: bool = False          # and in the MLP
    tie_embeddings: bool = True     # the first matrix is also the last: V x C fewer weights
    dropout: float = 0.0            # share of attention's and MLP's output that training zeroes

    def __post_init__(self):
        complete(self)          # derives what is None, and refuses what does not fit; see files

def insist(condition, message: str):
    """Check what people supply."""
    if not condition:
        raise ValueError(message)

# ---------------------------------------------------------------- the parts

class RMSNorm(nn.RMSNorm):
    """Divide each vector by its root mean square, then scale each coordinate (arXiv:1910.07467).
    Layers add to x, so x grows. Attention and MLP read a copy of constant size."""
    def forward(self, x):                                           # (..., C) -> (..., C)
        # Stay in the type of x. On GPUs mixed precision (autocast) would return fp32, and each
        # matrix that reads the result would convert it once more.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)

def make_norm(config: GPTConfig) -> nn.Module:
    """LayerNorm (arXiv:1607.06450) also subtracts the mean and adds a bias. RMSNorm leaves both
    out, with no measured harm."""
    return {"rms": RMSNorm, "layer": nn.LayerNorm}[config.norm](config.n_embd, config.norm_eps)

def rotary(positions, config: GPTConfig):
    """Angles that encode positions (T,): cosines and sines for rotate(), (T, D) each, in fp32.
    Attention itself is blind to order. RoPE (arXiv:2104.09864, section 3.2) cuts the D coordinates
    of a head into D/2 pairs and turns pair i by position * theta^(-2i/D): fast clock hands and slow
    ones. The dot product of a turned query and a turned key then depends on how far apart their
    positions are, and not on where they are.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    speed = scale_rope(config.rope_theta ** -exponents, config.rope_scaling)    # radians/position
    angles = positions[:, None] * speed                                         # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

def rotate(x, cos, sin):
    """Turn each pair (a, b) of x (B, heads, T, D) to (a cos - b sin, b cos + a sin). As in Llama, a
    and b are D/2 coordinates apart: roll swaps them, and the minus is in rotary's sines."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)

def attend(q, k, v):
    """softmax(q k^T / sqrt(D)) v, where no position sees a later one (arXiv:1706.03762, eq. 1).
    q (B, H, T, D); k, v (B, K, S, D): the queries are those of the last T of S positions.
    -> (B, H, T, D). Query head h reads key-value head h // (H/K) (arXiv:2305.13245). With K = H:
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(~mask, -math.inf)        # (B, H, T, S)
        return scores.softmax(dim=-1) @ v                                       # (B, H, T, D)
    Torch has this as one function, which never stores all scores at once."""
    T, S = q.shape[2], k.shape[2]
    mask = None             # rarely needed: is_causal does it for T = S; T = 1 sees all
    if 1 < T < S:           # position t of the last T sees the first S - T + t + 1
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if not q.is_cpu and (mask is not None or q.dtype != torch.bfloat16):
        # Here a GPU's fast kernels can't share heads, and the slow one stores all scores (T x S).
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=1 < T == S,
                                          enable_gqa=q.shape[1] != k.shape[1])

class Attention(nn.Module):
    """Each position sends a query; every position up to it holds a key and a value. The better a
    key matches the query, the more of its value is mixed in. H heads do so side by side."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.config = config
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.o_bias)
        if config.qk_norm:
            # These bound q k^T, whose large values leave the softmax hardly any gradient. Higher
            # learning rates stay stable (arXiv:2302.05442, section 2).
            self.q_norm, self.k_norm = (RMSNorm(D, config.norm_eps) for _ in "qk")

    def forward(self, x, rope, attend):
        """x (B, T, C) -> (B, T, C). rope: what rotary() returned for the positions of x."""
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))    # (B, H or K, T, D)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.positions == "rotary":
            q, k = rotate(q, *rope), rotate(k, *rope)
        y = attend(q, k, v)                                                # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))                   # (B, T, C)

class MLP(nn.Module):
    """n_inner detectors per position. GELU (arXiv:1606.08415) passes on those that fire; SwiGLU
    (arXiv:2002.05202) gives each a gate that opens or closes it. Attention moves information; most
    of what the model knows is stored here."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        sizes = config.n_embd, config.n_inner
        self.gate_proj = nn.Linear(*sizes, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.down_proj = nn.Linear(*sizes[::-1], bias=config.mlp_bias)

    def forward(self, x):                                           # (B, T, C) -> (B, T, C)
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Block(nn.Module):
    """One layer. Both parts read a normed copy of x and *add* to x, the residual stream. Through
    these sums the gradient has a straight way down, which is why deep stacks train at all."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, attend):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, attend))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))

# ---------------------------------------------------------------- the model

class GPT(nn.Module):
    """generate, save_pretrained and from_pretrained stand further down, where they are explained,
    and join this class there."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.n_embd),
            "layers": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "norm": make_norm(config)})
        if config.positions == "learned":
            self.model["embed_positions"] = nn.Embedding(config.block_size, config.n_embd)
        # Row i of this matrix scores token i. If tied, it also embeds it.
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    def forward(self, tokens, targets=None, reduction="mean"):
        """tokens (B, T) ids -> logits (B, T, V); with targets (B, T) -> their mean loss, a scalar.

        The loss is the cross-entropy in nats per target token: what the model pays, -ln p, for
        each token that really came. Positions whose target is -100 cost nothing and are not
        counted; if all are -100, the loss is 0. reduction="none": the loss of each, (B, T).
        """
        logits = self.lm_head(self.hidden(tokens))                              # (B, T, V)
        if targets is None:
            return logits
        # This is F.cross_entropy(..., reduction="none", ignore_index=-100), in less memory.
        losses = TokenLoss.apply(logits.flatten(0, 1), targets.flatten())       # (B T,)
        if reduction == "none":
            return losses.unflatten(0, targets.shape).clone()       # FSDP warns of views
        return losses.sum() / (targets != -100).sum().clamp(min=1)

    def hidden(self, tokens, start: int = 0, attends=None):
        """All but the last matrix: tokens (B, T) -> (B, T, C). For the KV cache, below: `start` is
        the position of the first token, `attends` holds a function in place of attend per layer."""
        end = start + tokens.shape[1]
        positions = torch.arange(start, end, device=tokens.device)              # (T,)
        x = self.model.embed_tokens(tokens)                                     # (B, T, C)
        if self.config.positions == "learned":
            insist(end <= self.config.block_size, f"{end} positions; this model has learned "
                   f"{self.config.block_size}")
            x = x + self.model.embed_positions(positions)
        kind, rope = x.device.type, rotary(positions, self.config)
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
            # The residual stream, too: saves 10 % of a step at 124M. (In fp16 it could overflow.)
            x = x.bfloat16()
        layers = self.model.layers
        for layer, attend_of_layer in zip(layers, attends or [attend] * len(layers)):
            x = layer(x, rope, attend_of_layer)
        return self.model.norm(x)

    def init_weights(self):
        """Normal with standard deviation 0.02, as in GPT-2, except for two kinds of matrices.

        Those that write into the residual stream get 1 / sqrt(2 n_layer) of that, because 2 n_layer
        of them are added up there (GPT-2 paper, section 2.3). A logit sums C terms, so its
        variance grows with C. So the first and the last matrix get 0.02 * sqrt(768 / C), and 768 is
        GPT-2's C. Then the first loss is as near to ln V at any size."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        for layer in self.model.layers:
            for matrix in layer.self_attn.o_proj, layer.mlp.down_proj:
                nn.init.normal_(matrix.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))
        for matrix in self.model.embed_tokens, self.lm_head:
            nn.init.normal_(matrix.weight, std=0.02 * math.sqrt(768 / self.config.n_embd))

    def count_parameters(self) -> int:
        return sum(weight.numel() for weight in self.parameters())      # tied ones count once

    def flops_per_token(self, T: int) -> int:
        """Operations of a training step per token, in rows of T tokens (arXiv:2204.02311, appendix
        B; as there, the masked half of attention counts). A weight costs 6: a multiply-add forward,
        two backward. Per head q k^T and softmax @ v cost 2 D T each, three times that in all."""
        c, layers = self.config, self.model.layers
        matrices = sum(weight.numel() for weight in layers.parameters() if weight.dim() == 2)
        return 6 * (matrices + self.lm_head.weight.numel()) + (
            12 * c.n_layer * c.n_head * c.head_dim * T)

# ---------------------------------------------------------------- generation

@torch.inference_mode()
def generate(model, tokens, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
             top_p: float = 1.0, min_p: float = 0.0, stop=(), seed: int | None = None, cache=None):
    """Continue the prompts tokens (B, T); yield the next ids (B,), step by step.

    temperature divides the logits: below 1 is safer, above 1 wilder, 0 always takes the likeliest
    token. top_k keeps the k likeliest tokens; top_p the likeliest that together have probability p;
    min_p those that are at least min_p times as likely as the likeliest. Ends after max_new_tokens,
    or when every row has produced one of the `stop` ids. The same seed gives the same tokens on the
    same device. When the context is full, its older half is forgotten: dropping one token at a
    time would move all positions, and compute all again, each time. cache: the KVCache of an
    earlier call; what it holds of the prompts is not computed again. Raises ValueError."""
    insist(temperature >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1 and (top_k is None or top_k > 0),
           f"temperature {temperature} (at least 0), top_k {top_k} (at least 1), top_p {top_p} "
           f"(above 0, at most 1) or min_p {min_p} (0 to 1) is out of range")
    device = model.lm_head.weight.device
    tokens, stop = (torch.as_tensor(ids, device=device) for ids in (tokens, list(stop)))
    B, T = tokens.shape
    insist(T > 0, "generate needs at least one token to continue")
    cache = cache or KVCache(model, B, min(model.config.block_size, T + max_new_tokens))
    random = torch.Generator(device)
    random.manual_seed(seed) if seed is not None else random.seed()
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    tokens = tokens[:, -cache.size:]
    for _ in range(max_new_tokens):
        if tokens.shape[1] > cache.size:
            tokens = tokens[:, -max(1, cache.size // 2):]
        logits = cache(tokens)                  # without a cache: model(tokens)[:, -1]
        ids = sample_next_token(logits.float(), temperature, top_k, top_p, min_p, random)
        yield ids
        ended |= torch.isin(ids, stop)
        if ended.all():
            return
        tokens = torch.cat([tokens, ids[:, None]], dim=1)

def sample_next_token(logits, temperature, top_k, top_p, min_p, random):
    """Draw one token per row: logits (B, V) -> ids (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature     # no overflow to +inf
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:       # the nucleus, arXiv:1904.09751: always holds the likeliest token
        ordered, order = logits.softmax(dim=-1).sort(descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p      # enough came before this one
        # scatter puts the flags, which are in order of probability, back in the order of the ids.
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    if min_p > 0:       # arXiv:2407.01082; the likeliest has the logit 0
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=random)[:, 0]

class KVCache:
    """The keys and values of the tokens that were read, so that a new token costs one position.
    cache(tokens) is model(tokens)[:, -1], but computes only what it does not hold: first the whole
    prompt, all positions at once ("prefill"), then one token after the other ("decode")."""
    def __init__(self, model: GPT, rows: int, size: int):
        """For `rows` texts of at most `size` tokens; memory is taken once."""
        c, weight = model.config, model.model.norm.weight
        self.model, self.size = model, size
        self.tokens = torch.empty(rows, 0, dtype=torch.long, device=weight.device)  # those it holds
        self.keys, self.values = (
            weight.new_empty(c.n_layer, rows, c.n_kv_head, size, c.head_dim) for _ in "kv")

    def __call__(self, tokens):
        """tokens (B, T), from the beginning of the texts -> logits of the next tokens, (B, V)."""
        n = min(tokens.shape[1] - 1, self.tokens.shape[1])      # the last must be computed
        same = (tokens[:, :n] == self.tokens[:, :n]).all(dim=0)
        start = int(same.cumprod(0).sum())
        self.tokens = tokens[:, :start]     # true even if the rest is interrupted
        x = self.model.hidden(tokens[:, start:], start, [
            partial(self.attend, layer, start) for layer in range(self.model.config.n_layer)])
        self.tokens = tokens
        return self.model.lm_head(x[:, -1])

    def attend(self, layer: int, start: int, q, k, v):
        """Put new keys and values (B, K, T, D) behind those that the layer has; attend to all."""
        end = start + k.shape[2]
        keys, values = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        keys[:, :, start:], values[:, :, start:] = k, v
        return attend(q, keys, values)

GPT.generate = generate

# ---------------------------------------------------------------- the same, faster or smaller

class TokenLoss(torch.autograd.Function):
    """Cross-entropy: logits (N, V), targets (N,) -> (N,) nats. The backward pass writes the
    gradient over the logits. So the largest tensor of a step exists once, not three times: 15 %
    less memory in train.py's first run. It computes in fp32, because in bf16 a sum over V terms
    would lose the small ones; in pieces that fit a CPU's cache. GPUs prefer few large ones."""
    @staticmethod
    def forward(ctx, logits, targets):
        ctx.rows = max(1, 2**(22 if logits.is_cpu else 27) // logits.shape[1])
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = torch.cat([
            F.cross_entropy(rows.to(wide), ids, reduction="none", ignore_index=-100)
            for rows, ids in zip(logits.split(ctx.rows), targets.split(ctx.rows))])
        ctx.save_for_backward(logits, targets, losses)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_losses):
        logits, targets, losses = ctx.saved_tensors
        ids, no_target = targets.clamp(min=0)[:, None], (targets == -100)[:, None]      # (N, 1)
        # ln sum exp(logits) is loss + the target's logit. No target: inf, which makes p 0.
        log_sum = (losses[:, None] + logits.gather(1, ids)).masked_fill(no_target, math.inf)
        by_losses = by_losses[:, None].masked_fill(no_target, 0)
        for rows, ids, log_sum, by_loss in zip(*(x.split(ctx.rows) for x in (
                logits, ids, log_sum, by_losses))):
            p = (rows - log_sum).exp_()         # the gradient of a loss: p, less 1 at the target
            rows.copy_(p.scatter_add_(1, ids, -torch.ones_like(log_sum)).mul_(by_loss))
        return logits, None

class Int8Linear(nn.Linear):
    """y = x W^T + b where row i of W is scale[i] * weight[i], and weight is in int8. Decoding a
    token reads every weight once and does little arithmetic with it, so memory bandwidth sets the
    speed: 1.4 to 1.8 times bf16's. For CPUs; on a GPU it saves memory, but no time."""
    def forward(self, x):
        if x.is_cpu and x.numel() == x.shape[-1]:       # one row: a kernel that reads int8
            y = torch.ops.aten._weight_int8pack_mm(x.view(1, -1), self.weight, self.scale)
            y = y.view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias

def quantize(model: GPT) -> GPT:
    """Turn matrices into int8, for generation (not the embedding, of which a token reads one row).
    A row's largest number becomes 127. Only weights change, and nothing is calibrated: the error is
    at most half a step, 1/254 of the row's largest number."""
    for module in model.modules():
        if type(module) is nn.Linear:
            weight = module.weight.detach()
            step = weight.abs().amax(dim=1).clamp(min=1e-12) / 127                      # (out,)
            small = (weight.float() / step.float()[:, None]).round().clamp(-127, 127)
            module.__class__, module.scale = Int8Linear, nn.Parameter(step, requires_grad=False)
            module.weight = nn.Parameter(small.to(torch.int8), requires_grad=False)
    return model

# ---------------------------------------------------------------- files: config.json

# The parts of a family, where they differ from GPTConfig's defaults; GPTConfig(**FAMILIES["gpt2"]).
FAMILIES = {
    "gpt2": dict(norm="layer", positions="learned", gated_mlp=False, qk_norm=False, qkv_bias=True,
                 o_bias=True, mlp_bias=True),
    "llama": dict(qk_norm=False),           # Llama 2 and 3, SmolLM2 and many more
    "mistral": dict(qk_norm=False),         # the same, and saved as llama
    "qwen2": dict(qk_norm=False, qkv_bias=True),        # and Qwen 2.5
    "qwen3": {}}

# The names of our fields in files, and where GPT-2's files have other names.
ENTRIES = dict(
    vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
    n_embd="hidden_size", n_head="num_attention_heads", n_kv_head="num_key_value_heads",
    head_dim="head_dim", n_inner="intermediate_size", norm_eps="rms_norm_eps",
    rope_theta="rope_theta", rope_scaling="rope_scaling", tie_embeddings="tie_word_embeddings")
GPT2_ENTRIES = dict(
    max_position_embeddings="n_positions", num_hidden_layers="n_layer", hidden_size="n_embd",
    num_attention_heads="n_head", intermediate_size="n_inner", rms_norm_eps="layer_norm_epsilon")

# What transformers assumes where an entry is absent; the others are required.
ABSENT = dict(head_dim=None, norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, tie_embeddings=False)
ABSENT_IN = {"gpt2": dict(n_kv_head=None, n_inner=None, norm_eps=1e-5, tie_embeddings=True),
             "llama": dict(n_kv_head=None), "qwen3": dict(head_dim=128)}

# Entries that must have this value where they are present: another would change the output, and is
# not implemented.
ONLY = dict(
    hidden_act="silu", activation_function="gelu_new", scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, use_sliding_window=False,
    rope_interleaved=False, partial_rotary_factor=1.0, quantization_config=None, num_experts=0,
    attn_logit_softcapping=None, final_logit_softcapping=None, logit_scale=1.0)

def complete(c: GPTConfig):
    """Derive the fields of a configuration that are None. Raises ValueError, one line, if its
    numbers do not fit each other."""
    for name in ("vocab_size", "block_size", "n_layer", "n_embd", "n_head", "n_kv_head", "head_dim",
                 "n_inner"):
        value, default = getattr(c, name), getattr(GPTConfig, name)
        insist(value is default or type(value) is int and 0 < value < 2**31, f"{name} is "
               f"{value!r}; it must be a whole number above 0")
    insist(c.norm in ("rms", "layer") and c.positions in ("rotary", "learned"), f"norm {c.norm!r} "
           f"must be 'rms' or 'layer', and positions {c.positions!r} 'rotary' or 'learned'")
    C, turned = c.n_embd or 64 * c.n_layer, c.positions == "rotary"
    # The largest H for which D = C / H is whole, even and at least 64.
    H = c.n_head or next((n for n in range(C // 64, 1, -1) if C % (2 * n) == 0), 1)
    insist(c.head_dim or C % H == 0, f"n_embd {C} is not divisible by n_head {H}; the nearest that "
           f"is: {max(1, round(C / (2 * H))) * 2 * H}")
    D = c.head_dim or C // H
    # GPT-2's layout, the one with learned positions, has no entries for K and D.
    K = c.n_kv_head or (H // 2 if turned and H % 2 == 0 else H)
    insist(H % K == 0, f"n_head {H} is not divisible by n_kv_head {K}")
    insist(D % 2 == 0 or not turned, f"head_dim {D} is odd, and rotary positions turn pairs")
    insist(turned or (K, H * D) == (H, C), f"n_kv_head {K}, head_dim {D}: with learned positions "
           "there are n_head key-value heads, of n_embd / n_head each")
    insist(0 <= c.dropout < 1, f"dropout is {c.dropout!r}; it must be at least 0, less than 1")
    insist(c.n_layer < 10_000, f"n_layer is {c.n_layer}; that many layers would fill any memory")
    c.n_embd, c.n_head, c.n_kv_head, c.head_dim = C, H, K, D
    c.n_inner = c.n_inner or ((C * 8 // 3 + 63) // 64 * 64 if c.gated_mlp else 4 * C)
    scale_rope(torch.ones(1), c.rope_scaling)

def scale_rope(speed, scaling: dict | None):
    """Slow down rotary positions, (D/2,) radians each, for rows longer than those of the training.
    All by a factor ("linear", arXiv:2306.15595); or only those that turn less than about once
    in a row of the training ("llama3", arXiv:2407.21783, section 3.4.2)."""
    if scaling is None:
        return speed
    names = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor",
                                              "original_max_position_embeddings"]}
    found = [scaling.get(name) for name in names.get(scaling.get("rope_type"), [""])]
    insist(all(type(number) in (int, float) for number in found), f"rope_scaling is {scaling!r}; "
           "only the rope_type 'linear' and 'llama3' are implemented, with their numbers")
    # "linear": length 0, so that fast is 0.
    factor, low, high, length = found if len(found) == 4 else (*found, 1, 2, 0)
    turns = speed * length / (2 * math.pi)                  # in the longest row of the training
    fast = ((turns - low) / (high - low)).clamp(0, 1)       # 1: leave it as it is
    return speed * (fast + (1 - fast) / factor)

def read_json(path):
    """What a JSON file holds. ValueError, one line, if it is none; OSError if it can't be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:       # RecursionError: 100,000 brackets
        raise ValueError(f"{path} is no JSON file: {error}") from None

def read_config(entries: dict) -> GPTConfig:
    """The entries of a config.json -> ours. ValueError for what the model can't honour."""
    family = entries.get("model_type")
    insist(family in FAMILIES, f"model_type is {family!r}; implemented are {', '.join(FAMILIES)}")
    if family == "gpt2":
        entries = entries | {name: entries.get(old) for name, old in GPT2_ENTRIES.items()}
    # Rotary positions: one group of entries in transformers 5, separate ones in older files.
    rope = (entries.get("rope_parameters") or {}) | (entries.get("rope_scaling") or {})
    rope = {"rope_type": rope.get("type", "default")} | rope
    entries = entries | {name: rope[name] for name in ("rope_theta",) if name in rope}
    entries["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    for name, only in ONLY.items():
        value = entries.get(name)
        same = value == only and isinstance(value, bool) == isinstance(only, bool)  # 1 is not True
        insist(value is None or same, f"{name} is {value!r}; only {only!r} is implemented")
    layers = set(entries.get("layer_types") or ())
    insist(layers <= {"full_attention"}, f"layer_types {layers}: one kind is implemented, full")
    absent, found = ABSENT | ABSENT_IN.get(family, {}), dict(FAMILIES[family])
    for field, name in ENTRIES.items():
        found[field] = absent.get(field) if entries.get(name) is None else entries[name]
        insist(found[field] is not None or field in absent, f"{name} is missing")
    found |= {name: float(found[name]) for name in ("norm_eps", "rope_theta")}
    if family == "llama":
        found["n_kv_head"] = found["n_kv_head"] or found["n_head"]
        found["mlp_bias"] = bool(entries.get("mlp_bias"))
    if family in ("llama", "qwen3"):
        found["qkv_bias"] = found["o_bias"] = bool(entries.get("attention_bias"))
    window = entries.get("sliding_window", 4096) if family == "mistral" else None
    insist(window is None or window >= found["block_size"], f"sliding_window is {window}: what is "
           "less than max_position_embeddings is not implemented")
    return GPTConfig(**found)

def write_config(c: GPTConfig) -> dict:
    """Our configuration -> the entries of a config.json, of the family that has these parts."""
    family = ("gpt2" if c.positions == "learned" else "qwen3" if c.qk_norm else
              "qwen2" if (c.qkv_bias, c.o_bias) == (True, False) else "llama")
    entries = {name: getattr(c, field) for field, name in ENTRIES.items()}
    if family == "gpt2":
        entries = {name: entries[name] for name in ("vocab_size", "tie_word_embeddings")} | {
            old: entries[name] for name, old in GPT2_ENTRIES.items()}
    elif family != "qwen2":
        entries |= {"attention_bias": c.o_bias, "mlp_bias": c.mlp_bias}
    kind = "GPT2LMHeadModel" if family == "gpt2" else f"{family.capitalize()}ForCausalLM"
    entries |= {"model_type": family, "architectures": [kind]}
    insist(read_config(entries) == replace(c, dropout=0.0), f"no family has these parts: {c}")
    return entries

# ---------------------------------------------------------------- files: weights

GPT2_NAMES = {"wte": "embed_tokens", "wpe": "embed_positions", "h": "layers",
              "ln_1": "input_layernorm", "attn.c_proj": "self_attn.o_proj",
              "ln_2": "post_attention_layernorm", "mlp.c_fc": "mlp.up_proj",
              "mlp.c_proj": "mlp.down_proj", "ln_f": "norm", "transformer": "model"}

def rename(tensors: dict, names: dict) -> dict:
    """Tensors under other names; matrices of layers transposed, because GPT-2's are (in, out)."""
    renamed = {}
    for name, tensor in tensors.items():
        transposed = tensor.dim() == 2 and re.search(r"\b(h|layers)\.", name)
        for old, new in names.items():
            name = re.sub(rf"\b{old}\.", f"{new}.", name)
        renamed[name] = tensor.t().contiguous() if transposed else tensor
    return renamed

def from_gpt2(tensors: dict) -> dict:
    """GPT-2's tensors -> ours. Its queries, keys and values come from one matrix, c_attn."""
    # Some files leave out the first part of the names.
    ours = rename({re.sub(r"^(wte|wpe|h|ln_f)\.", r"transformer.\1.", name): tensor
                   for name, tensor in tensors.items()}, GPT2_NAMES)
    for name in [name for name in ours if ".c_attn." in name]:
        ours |= zip((name.replace("attn.c_attn", f"self_attn.{q}_proj") for q in "qkv"),
                    ours.pop(name).chunk(3))
    return ours

def to_gpt2(tensors: dict) -> dict:
    """The way back."""
    for name in [name for name in tensors if ".q_proj." in name]:
        parts = [tensors.pop(name.replace("q_proj", f"{q}_proj")) for q in "qkv"]
        tensors[name.replace("self_attn.q_proj", "attn.c_attn")] = torch.cat(parts)
    return rename(tensors, {new: old for old, new in GPT2_NAMES.items()})

# https://github.com/huggingface/safetensors#format: 8 bytes with the length of a JSON header, the
# header {name: {dtype, shape, data_offsets}}, then the numbers. Nothing in it can be executed.
SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                     "BF16": torch.bfloat16}

@contextmanager
def write_whole(path):
    """Open a file that appears under its name complete or not at all, even if the power fails: it
    is written under a name of this process alone, forced to the disk, and renamed."""
    beside = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)

def write_safetensors(path, tensors: dict):
    """Write named tensors as one file. OSError if the disk is full."""
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    insist({tensor.dtype for tensor in tensors.values()} <= names.keys(), "int8 is for generation; "
           "other programs can't open such files")
    header, end = {"__metadata__": {"format": "pt"}}, 0
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

def read_safetensors(path) -> dict:
    """-> {name: tensor}, those of floating point, as a private view of the file: nothing is read
    before it is used, and what changes in memory does not change the file. ValueError, one line, if
    it is damaged; OSError if it can't be read."""
    try:
        with open(path, "rb") as file:
            # Windows can't replace a file that is mapped, and an open chat would block all saves.
            data = (bytearray(file.read()) if sys.platform == "win32" else
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        numbers = torch.frombuffer(data, dtype=torch.uint8, offset=start)
        # Each tensor begins where another ends: none overlap, and no byte is unaccounted for.
        begins, ends = zip(*sorted(entry["data_offsets"] for entry in header.values()))
        insist([*begins, len(numbers)] == [0, *ends], "its tensors do not fill it")
        return {name: numbers[slice(*entry["data_offsets"])].view(
                    SAFETENSORS_TYPES[entry["dtype"]]).view(entry["shape"])
                for name, entry in header.items() if entry["dtype"] in SAFETENSORS_TYPES}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]         # RuntimeError: also a JSON of 100,000 brackets
        raise ValueError(f"{path} can't be read as safetensors: {reason}") from None

def save_pretrained(model, directory, weights: dict | None = None, tokenizer=None):
    """Write config.json and model.safetensors as transformers does for the model's family. Each
    file is replaced atomically. Raises ValueError; OSError if the disk is full.

    weights: a state dict to write instead of the model's own. tokenizer: a directory; its files are
    copied."""
    directory, entries = Path(directory), write_config(model.config)
    tensors = dict(model.state_dict() if weights is None else weights)
    entries["torch_dtype"] = str(tensors["model.norm.weight"].dtype).removeprefix("torch.")
    if model.config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    if entries["model_type"] == "gpt2":
        tensors = to_gpt2(tensors)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", tensors)
    files = {"config.json": json.dumps(entries, indent=2).encode()}
    for name in "tokenizer.json", "tokenizer_config.json", "generation_config.json":
        if tokenizer and Path(tokenizer, name).exists():
            files[name] = Path(tokenizer, name).read_bytes()
    for name, content in files.items():
        with write_whole(directory / name) as file:
            file.write(content)

def from_pretrained(cls, directory, device="cpu", dtype=None):
    """Open what save_pretrained, transformers or a model hub wrote, ready to use (eval mode).
    dtype: of the weights; by default as in the file. On a CPU, what needs no conversion stays
    memory-mapped. Raises ValueError or OSError, one line, for what is missing, damaged or not
    implemented."""
    directory = Path(directory)
    try:
        entries = read_json(directory / "config.json")
        config = read_config(entries)
        files, index = ["model.safetensors"], directory / "model.safetensors.index.json"
        if index.exists() and not (directory / files[0]).exists():      # in several parts
            files = sorted({Path(name).name for name in read_json(index)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory}: {error}") from None
    tensors = {}
    for file in files:
        tensors |= read_safetensors(directory / file)
    # Old files also hold constants: rotary angles, and the causal mask, which GPT-2 calls a bias.
    tensors = {name: tensor for name, tensor in tensors.items()
               if not name.endswith((".inv_freq", ".attn.bias", ".attn.masked_bias"))}
    if entries["model_type"] == "gpt2":
        tensors = from_gpt2(tensors)
    # Some files hold two matrices although the config says that they are one: the files are right.
    embedding = tensors.get("model.embed_tokens.weight", torch.empty(0))
    config.tie_embeddings &= torch.equal(tensors.get("lm_head.weight", embedding), embedding)
    if config.tie_embeddings:
        tensors["lm_head.weight"] = embedding
    with torch.device("meta"):          # no memory: the tensors of the file take the places
        model = cls(config)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:       # names what is missing, not expected or of another shape
        raise ValueError(f"{directory}: {' '.join(str(error).split())[:300]}") from None
    for name, tensor in tensors.items():        # one term that is not spoils the sum
        insist(tensor.sum(dtype=torch.float32).isfinite(), f"{directory}: {name} is not finite")
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device, dtype).eval()

GPT.save_pretrained, GPT.from_pretrained = save_pretrained, classmethod(from_pretrained)

# ---------------------------------------------------------------- training tools: the machine

# What train.py and finetune.py share. If you only want the model, stop here.

def pick_device(name: str | None = None) -> torch.device:
    """The device that was asked for, or the fastest one of this machine. ValueError if there is no
    such device. Under torchrun each process of a machine gets a GPU of its own."""
    mps = torch.backends.mps.is_available() and "RANK" not in os.environ     # gloo can't
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * mps + ["cpu"]
    name, number = name or here[0], int(os.environ.get("LOCAL_RANK", 0))
    insist(name in here, f"device {name!r} is not available here; there is: {', '.join(here)}")
    if name == "cuda":
        insist(number < torch.cuda.device_count(), "more ranks than GPUs: a lower --nproc_per_node")
        torch.cuda.set_device(number)
    return torch.device(name)

def keep_freed_memory():
    """Tell glibc to keep the blocks that torch frees instead of returning them to the kernel. A
    training step allocates the same hundreds of megabytes each time. By default the kernel takes
    each page back and clears it again: up to half of a step on a CPU. (mallopt(3): M_MMAP_MAX is
    -4, M_TRIM_THRESHOLD -1, M_TOP_PAD -2. No other C library has it or needs it.)"""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)
        for option, value in (-4, 0), (-1, 2**31 - 1), (-2, 2**26):
            mallopt(option, value)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
def pick_dtype(device: torch.device) -> str:
    """The fastest safe one of DTYPES to compute in; all ranks choose the same. A collective.
    Weights stay in fp32. bf16 has the range of fp32 with 8 bits of precision. That is enough for
    matrix products, and twice to ten times as fast where the hardware supports it. fp16 has a
    smaller range, so that the loss must be scaled up (GradScaler in the loop). It is for GPUs that
    have no bf16."""
    if device.type == "cuda":
        votes = all_sum(torch.cuda.is_bf16_supported(including_emulation=False))
        return "bf16" if votes == world_size() else "fp16"
    if device.type == "mps":
        return "fp32"
    # Some CPUs have slow bf16 units or only emulate them, and do not say so. Therefore measure.
    seconds = {}
    for name in "fp32", "bf16":
        a = torch.ones(1024, 1024, dtype=DTYPES[name])
        seconds[name] = min(timeit.repeat(lambda: a @ a, number=1, repeat=9))
    votes = all_sum(seconds["bf16"] < seconds["fp32"])
    return "bf16" if 2 * votes > world_size() else "fp32"

# ---------------------------------------------------------------- training tools: many processes

# torchrun starts the script once per GPU, and tells each process its rank. All ranks hold the same
# weights, each computes the gradient of its own rows of the batch, and the sum over ranks is the
# gradient of the whole batch. With one process these functions do nothing.

def init_distributed(device: torch.device) -> tuple[int, int]:
    """Connect to the other processes that torchrun started, if any. -> (rank, world size)"""
    if "RANK" in os.environ and not dist.is_initialized():
        # gloo for what is on the CPU: numbers to log, checkpoints. A long timeout, because the
        # others wait while rank 0 encodes a text or writes a checkpoint.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=6))
    return (dist.get_rank() if dist.is_initialized() else 0), world_size()

def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1

def all_sum(numbers) -> torch.Tensor:
    """Numbers, or an array of them -> their sums over all ranks, in fp64 on the CPU.
    A collective: every rank must call it, and waits here for the others."""
    total = torch.as_tensor(numbers, dtype=torch.float64).clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total

def move_to_device(model, device: torch.device, dtype: str, sharded: bool):
    """Move a model from the CPU to the device of each rank, with the weights of rank 0. sharded:
    FSDP2 (arXiv:2304.11277). Each rank keeps a shard of every weight, gradient and optimizer state,
    and a layer's full weights exist only while it computes. For models that are too large for one
    device: none ever holds a full one."""
    for weight in model.parameters() if world_size() > 1 else ():
        dist.broadcast(weight.detach(), src=0)      # other CPUs may draw other random numbers
    if not sharded:
        return model.to(device)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    # Weights are sent in bf16, gradients in fp32. (With fp16 the residual stream would be fp16.)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if dtype == "bf16" else None,
                                  reduce_dtype=torch.get_default_dtype(), cast_forward_inputs=False)
    # Without a mesh fully_shard would take the GPUs of this machine, also when --device is cpu.
    mesh = dist.init_device_mesh(device.type, (world_size(),))
    for module in *model.model.layers, model:
        # The outermost module, too, frees its full weights after a forward pass. Otherwise the
        # evaluation before finetune.py's first step would leave full weights in memory.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model

def sum_gradients(model, sharded: bool):
    """Replace each gradient by its sum over all ranks. A collective. DistributedDataParallel does
    this during the last backward pass, which hides some of the time. Here the sum comes afterwards,
    so that a rank that ran out of memory can repeat its backward pass while the others wait."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    if sharded:         # FSDP has exchanged them already, but as a mean over the ranks
        for gradient in gradients:
            gradient.mul_(world_size())
    elif world_size() > 1:
        for handle in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            handle.wait()

def leave(code: int):
    """End this process. Under torchrun by os._exit, which ends all threads at once. If a thread of
    gloo drops the last tensor that it sent while the interpreter shuts down, the process aborts,
    and torchrun reports a finished run as failed."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

def make_optimizers(model, name: str, lr: float, weight_decay: float) -> list:
    """AdamW for all weights; or Muon for the matrices of the layers, and AdamW for the rest.

    AdamW (arXiv:1711.05101) divides each averaged gradient by its typical size. Weight decay pulls
    matrices towards 0, but not the scales of norms, which belong near 1. beta2 is 0.99: the typical
    size is an average over about a hundred steps. GPT-3 took 0.95, but for batches of millions of
    tokens; the smaller the batch, the more steps it takes (arXiv:2507.07101). Muon
    (arXiv:2502.16982) makes all directions of a matrix's averaged gradient equally strong, so that
    rare ones are learned as fast as common ones. Its updates have the size of AdamW's."""
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    muon = {weight for weight in model.model.layers.parameters()
            if name == "muon" and weight.requires_grad and weight.dim() == 2}
    groups = [{"params": [weight for weight in learned if weight.dim() == 2 and weight not in muon],
               "weight_decay": weight_decay},
              {"params": [weight for weight in learned if weight.dim() < 2], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)]
    if muon:        # in the order of the model: a set has none
        optimizers.append(torch.optim.Muon([weight for weight in learned if weight in muon], lr=lr,
                          weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers

def learning_rate(step, peak, warmup_steps, max_steps, schedule="wsd") -> float:
    """Linear warm-up to `peak`. Then `peak` until the last fifth of the run, and a straight line
    down to 0 ("wsd": warm-up, stable, decay; arXiv:2404.06395, section 4; a fifth:
    arXiv:2405.18392); or half a cosine down to 0 ("cosine"). Warm-up, because AdamW's first
    averages rest on few gradients. Decay, because small steps near the end average out the noise
    of the batches: down to 0, not to a tenth (arXiv:2502.15938). Here wsd ended lower than the
    cosine in pretraining, and higher in SFT (README.md); and its run can still be made longer."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    if schedule == "wsd":
        return peak * min(1.0, 5 * (1 - progress))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))

def out_of_memory(error: Exception) -> bool:
    """Does this error say that memory ran out? torch has a class for that only on GPUs."""
    messages = "out of memory", "DefaultCPUAllocator", "not create a primitive", "ALLOC_FAILED"
    return isinstance(error, MemoryError) or any(text in str(error) for text in messages)

# ---------------------------------------------------------------- training tools: a checkpoint

FULL = full_states.StateDictOptions(full_state_dict=True, cpu_offload=True)
def full_state(model, optimizers) -> dict:
    """Copies of all weights and optimizer states, by the names of the weights: full tensors on the
    CPU of rank 0, nothing on other ranks. A collective."""
    weights, optimizer = full_states.get_state_dict(model, optimizers, options=FULL)
    all_sum([0])    # a GPU sends later than it is told to: no rank may end before rank 0 has all
    return {"model": weights, "optimizer": optimizer}

def save_checkpoint(path, state: dict, **notes):
    """Replace the checkpoint atomically: whenever the process is killed, `path` is whole. Holds
    tensors and plain types only, so that opening it cannot run code. Raises OSError."""
    with write_whole(path) as file:
        torch.save({**state, **notes}, file)

def load_checkpoint(path) -> dict:
    """The other way. Memory-mapped: nothing is read before it is used."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:      # the zip reader and the unpickler raise a dozen kinds
        raise ValueError(f"{path} is damaged or no checkpoint: {str(error)[:99]!r}") from None

def restore(saved: dict, model, optimizers):
    """Put the tensors of a checkpoint back into model and optimizers, whatever the number of ranks
    that wrote it. A collective; every rank opens the file and keeps its shard."""
    full_states.set_state_dict(
        model, optimizers, model_state_dict=saved.pop("model"), options=FULL,
        optim_state_dict=saved.pop("optimizer"))
    # An optimizer on the CPU adopts the tensors that it is given. Copy them: while they are mapped,
    # a replaced file still takes up the disk.
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state.update({name: value.clone() for name, value in state.items()})
