# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "numpy"]
# ///
"""The decoder transformer: the model of train.py and sample.py, whole, in one file.

    from gpt import GPT, GPTConfig
    model = GPT(GPTConfig(n_layer=4, vocab_size=4096))      # random weights
    logits = model(tokens)                                  # (B, T) ids -> (B, T, V) scores
    loss = model(tokens, targets)                           # nats per target token
    for step in model.generate(tokens, 100): ...            # (B,) ids, as they are made
    model.save_pretrained("out/mine")                       # opens in transformers, too
    model = GPT.from_pretrained("out/mine")

A language model gives, for each place in a text, a probability to every token that could come next.
Here is how, bottom to top: a token becomes a vector (Embedding); layers alternate between mixing
vectors across places (Attention) and transforming each vector by itself (MLP); a last matrix turns
each vector into V scores, the logits. Every part is what Qwen3 uses (arXiv:2505.09388, section 2),
because that is the design most recent open models agree on, and the names of the weights are those
of its Hugging Face checkpoints: what is trained here opens elsewhere as it is. Left out on purpose:
biases and dropout inside attention (not needed at any size), experts, sliding windows, other
layouts: from_pretrained refuses them by name.

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
import timeit
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------- configuration

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
    norm_eps: float = 1e-6
    tie_embeddings: bool = True    # input and output matrix are one: V x C weights saved
    dropout: float = 0.0           # share of each layer's output that training sets to zero

    def __post_init__(self):
        def derive(name, value):
            if getattr(self, name) is None:
                setattr(self, name, value)
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a whole number "
                                 "above 0")
        for name in ("vocab_size", "block_size", "n_layer"):
            derive(name, None)
        derive("n_embd", 64 * self.n_layer)
        heads = range(max(1, self.n_embd // 64), 1, -1)         # of these the first that divides
        derive("n_head", next((n for n in heads if self.n_embd % (2 * n) == 0), 1))
        derive("n_kv_head", self.n_head if self.n_head % 2 else self.n_head // 2)
        derive("n_inner", (self.n_embd * 8 // 3 + 63) // 64 * 64)
        if self.head_dim is None and self.n_embd % self.n_head:
            nearest = max(1, round(self.n_embd / (2 * self.n_head))) * 2 * self.n_head
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; "
                             f"the nearest that is: {nearest}")
        derive("head_dim", self.n_embd // self.n_head)
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions turn pairs, so it "
                             "must be even")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head "
                             f"{self.n_kv_head}; each serves an equal number of query heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}; it must be at least 0 and less than 1")


# ---------------------------------------------------------------- the parts

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


def rotary(positions, head_dim: int, theta: float):
    """Angles that encode positions (T,): cos and sin, each (T, 1, D/2), equal for all heads; fp32.

    Attention itself is blind to order. RoPE (arXiv:2104.09864, section 3.2) cuts a head's D
    coordinates into D/2 pairs and turns pair i by position * theta^(-2i/D): fast clock hands and
    slow ones. The dot product of a turned query and a turned key then knows only how far apart they
    are, not where.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions[:, None, None].float() * theta ** -exponents
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the pairs of x (B, T, H, D). Pair i is coordinates i and i + D/2, Llama's layout."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def attend(q, k, v):
    """softmax(q k^T / sqrt(D)) v, where no place sees a later one (arXiv:1706.03762, eq. 1).

    q (B, H, T, D); k, v (B, K, S, D) with S >= T: the queries are the last T of S places.
    Head h reads key-value head h // (H/K) (grouped queries, arXiv:2305.13245). -> (B, H, T, D)
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
    # T queries of T places see a triangle, and one query sees all; else the triangle's last T rows.
    seen = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=1 < T == S,
                                          enable_gqa=H != K)


class Cache:
    """Keys and values of the places already seen, so that a new token computes only its own."""

    def __init__(self, model, batch: int, size: int):
        c, weight = model.config, model.output_matrix
        shape = (2, batch, c.n_kv_head, size, c.head_dim)
        self.length = 0
        self.memory = {layer.self_attn: weight.new_empty(shape) for layer in model.layers}

    def extend(self, layer, k, v):
        """Store k, v (B, K, T, D) behind what is there; return all of both (B, K, S, D)."""
        memory, end = self.memory[layer], self.length + k.shape[2]
        memory[0, :, :, self.length:end], memory[1, :, :, self.length:end] = k, v
        return memory[:, :, :, :end]


class Attention(nn.Module):
    """Each place asks (query); each place up to it offers (key) and, as far as they match, tells
    (value). H heads ask different questions at the same time."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.q_proj = nn.Linear(C, config.n_head * D, bias=False)
        self.k_proj = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.v_proj = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.o_proj = nn.Linear(config.n_head * D, C, bias=False)
        # Norms on queries and keys keep scores from growing without limit, which would flatten the
        # softmax's gradient: higher learning rates stay stable (arXiv:2302.05442, section 2).
        self.q_norm = RMSNorm(D, config.norm_eps)
        self.k_norm = RMSNorm(D, config.norm_eps)
        self.head_dim = D

    def forward(self, x, cos, sin, cache=None):
        B, T, C = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))      # -> (B, T, H, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))      # -> (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)                   # -> (B, T, K, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # -> (B, H or K, T, D)
        if cache is not None:
            k, v = cache.extend(self, k, v)                                # -> (B, K, S, D)
        y = attend(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))            # -> (B, T, C)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): n_inner detectors, each with a gate that opens or closes it.

    Attention moves information; most of what the model knows is stored here.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer. Both parts read a normed copy and *add* to x, the residual stream: the gradient
    has a straight way down through the sums, which is why deep stacks train at all."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, cache))
        x = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return x


# ---------------------------------------------------------------- the model

class GPT(nn.Module):

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    def forward(self, tokens, targets=None, cache=None):
        """tokens (B, T) ids -> logits (B, T, V); with targets (B, T) -> their mean loss, a scalar.

        The loss is the cross-entropy in nats per target token: what the model pays, -ln p, for
        each token that really came. Targets of -100 (torch's default `ignore_index`) cost nothing
        and are not counted; if all are, the loss is 0. With a cache, tokens continue what it holds.
        """
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed_tokens(tokens)                                      # (B, T) -> (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            # What the layers add is in this type anyway; the sum in it halves the memory traffic.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for layer in self.layers:
            x = layer(x, cos, sin, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        logits = F.linear(self.norm(x), self.output_matrix)                # (B, T, C) -> (B, T, V)
        if targets is None:
            return logits
        # At least fp32: a sum over V terms in bf16 would lose the small ones.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # A sum, because a mean over no targets would be 0/0.
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return total / (targets != -100).sum().clamp(min=1)

    @property
    def output_matrix(self):
        """(V, C): row t is the direction of token t. The tied one serves both ends."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def init_weights(self):
        """Normal with standard deviation 0.02, GPT-2's, but for two kinds of matrices.

        A logit is a sum over the width, and the variances of independent terms add: so the ones
        that make logits shrink as 1 / sqrt(width), from 0.02 at GPT-2's width of 768. Then the
        first loss is equally near to ln V at any size. The ones that write into the residual
        stream get another 1 / sqrt(2 n_layer), because 2 n_layer of them are added up there (GPT-2
        paper, section 2.3)."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
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
        return 6 * (matrices + self.output_matrix.numel()) + (
            12 * c.n_layer * c.n_head * c.head_dim * c.block_size)

    # ------------------------------------------------------------ generation

    @torch.inference_mode()
    def generate(self, tokens, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, stop=(),
                 seed: int | None = None):
        """Continue the rows of tokens (B, T); yield the next ids (B,), step by step.

        temperature divides the logits: below 1 safer, above 1 wilder, 0 always the likeliest token.
        top_k keeps the k likeliest tokens, top_p the likeliest that together have probability p.
        Ends after max_new_tokens, or when every row has produced one of the `stop` ids; rows that
        have go on until then. The same seed gives the same tokens. When block_size places are full,
        the older half of them is forgotten, so that the rest need not be computed again for every
        token. Call eval() before if the model has dropout.
        """
        B, T = tokens.shape
        if T == 0:
            raise ValueError("generate needs at least one token to go on from")
        if temperature < 0 or (top_k is not None and top_k < 1) or (
                top_p is not None and not 0 < top_p <= 1):
            raise ValueError(f"temperature {temperature}, top_k {top_k} or top_p {top_p} is out of "
                             "range: at least 0, at least 1, above 0 and at most 1")
        random = torch.Generator(tokens.device)
        random.manual_seed(seed) if seed is not None else random.seed()
        stop = torch.tensor(sorted(stop), device=tokens.device, dtype=torch.long)
        ended = torch.zeros(B, dtype=torch.bool, device=tokens.device)
        block_size = self.config.block_size
        context = tokens[:, -block_size:]
        cache = Cache(self, B, min(block_size, T + max_new_tokens))
        for _ in range(max_new_tokens):
            if cache.length == block_size:
                cache.length, context = 0, context[:, -(block_size // 2 or 1):]
            # What the cache does not hold yet: the whole context at first, then the newest token.
            logits = self(context[:, cache.length:], cache=cache)[:, -1]        # (B, V)
            next_tokens = sample(logits.float(), temperature, top_k, top_p, random)
            yield next_tokens
            ended |= torch.isin(next_tokens, stop)
            if ended.all():
                return
            context = torch.cat([context, next_tokens[:, None]], dim=1)

    # ------------------------------------------------------------ files

    def save_pretrained(self, directory, **extra):
        """Write config.json and model.safetensors, the layout of Hugging Face's Qwen3ForCausalLM.

        extra: more entries for config.json, such as eos_token_id. Each file is replaced whole.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        prefixed = {name if name.startswith("lm_head") else f"model.{name}": weight
                    for name, weight in self.state_dict().items()}
        write_safetensors(directory / "model.safetensors", prefixed, {"format": "pt"})
        dtype = str(self.output_matrix.dtype).removeprefix("torch.")
        entries = {name: getattr(self.config, field) for name, field in HF_NAMES.items()}
        entries |= HF_FIXED | {"torch_dtype": dtype} | extra
        with write_whole(directory / "config.json") as file:
            file.write(json.dumps(entries, indent=2).encode())

    @classmethod
    def from_pretrained(cls, directory, device="cpu", dtype=None):
        """Open what save_pretrained or transformers wrote, ready to use (in eval mode). On a CPU
        the weights stay memory-mapped.

        Raises ValueError or OSError, one line, for what is missing, damaged or of another layout.
        """
        directory = Path(directory)
        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory} holds no config.json; give the directory of a model")
        try:
            fields = read_config(json.loads((directory / "config.json").read_text("utf-8")))
        except ValueError as error:
            raise ValueError(f"{directory / 'config.json'}: {error}") from None
        tensors, _ = read_safetensors(directory / "model.safetensors")
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        with torch.device("meta"):      # no memory: the tensors of the file take the places
            model = cls(GPTConfig(**fields))
        if model.config.tie_embeddings:
            tensors.pop("lm_head.weight", None)
        wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise ValueError(f"{directory / 'model.safetensors'}: {name} is "
                                 f"{found.get(name, 'missing')}, config.json asks for "
                                 f"{wanted.get(name, 'none')}")
        model.load_state_dict(tensors, assign=True)
        return model.to(device=device, dtype=dtype).eval()


def sample(logits, temperature: float, top_k: int | None, top_p: float | None, random):
    """Draw one token per row: logits (B, V) -> ids (B,)."""
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
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=random)[:, 0]


# ---------------------------------------------------------------- files: config.json

# Names of our fields in Hugging Face's configuration, and what a Qwen3 has besides them. The second
# table is written as it is; a file that says something else there is refused, because to ignore it
# would give wrong answers.
HF_NAMES = dict(
    vocab_size="vocab_size", max_position_embeddings="block_size", num_hidden_layers="n_layer",
    hidden_size="n_embd", num_attention_heads="n_head", num_key_value_heads="n_kv_head",
    head_dim="head_dim", intermediate_size="n_inner", rope_theta="rope_theta",
    rms_norm_eps="norm_eps", tie_word_embeddings="tie_embeddings")
HF_FIXED = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_act="silu", attention_bias=False,
    attention_dropout=0.0, use_sliding_window=False, rope_scaling=None)


def read_config(entries: dict) -> dict:
    """config.json -> the fields of a GPTConfig. ValueError for what the model can't honour."""
    if not isinstance(entries, dict) or "model_type" not in entries:
        raise ValueError("no model_type in it; only 'qwen3' is understood")
    rope = entries.get("rope_parameters") or {}     # transformers 5 has a group for these
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters is {rope!r}; only rope_type 'default' is understood")
    entries = rope | entries
    for name, value in HF_FIXED.items():
        if entries.get(name, value) != value:
            raise ValueError(f"{name} is {entries[name]!r}; only {value!r} is understood")
    kinds = {"rope_theta": float, "norm_eps": float, "tie_embeddings": bool}
    fields = {}
    for name, field in HF_NAMES.items():
        kind, value = kinds.get(field, int), entries.get(name)
        if type(value) is int and kind is float:
            value = float(value)
        if type(value) is not kind and not (name == "head_dim" and value is None):
            raise ValueError(f"{name} is {value!r}, not of type {kind.__name__}")
        fields[field] = value
    return fields


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


def read_safetensors(path) -> tuple[dict, dict]:
    """-> (tensors by name, metadata). The tensors are a private view of the file (copy-on-write):
    nothing is read before it is used, and what changes in memory does not change the file.
    ValueError if the file is damaged."""
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
            tensors[name] = torch.empty(shape, dtype=dtype) if count == 0 else torch.frombuffer(
                data, dtype=dtype, count=count, offset=start + begin).view(shape)
        if end != size - start:
            raise ValueError(f"{size - start - end} bytes belong to no tensor")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, or of an unknown kind: {error}") from None
    return tensors, metadata


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
