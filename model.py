"""The model: one Transformer, its initial weights, its parameter groups, and how it makes text.

    from model import Transformer
    model = Transformer.from_pretrained("out/demo/ckpt_007")     # or a folder from Hugging Face
    logits = model(idx)                                          # (B, T) -> (B, T, V)
    loss = model(idx, targets)                                   # the mean over all targets

One class is Amber-7B (LLaMA, arXiv 2302.13971) and CrystalCoder-7B (LayerNorm, biases, a quarter of
each head rotated, a tied head, muP); configs/__init__.py lists the switches that part them. Reads
and writes Hugging Face folders of both. Parameter names are Hugging Face's LLaMA names.

Shapes: B batch, T tokens, C = n_embd, H = n_head, D = C/H, F = n_inner, V = vocab_size, r =
rotary_dim, m = C / mup_base_width. All weights are (out, in).
"""

import functools
import hashlib
import math
import platform
import re
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from nano360.config import CHECKPOINT, ENVIRONMENT, ModelConfig, Stop
from nano360.hf_folders import read_config, read_weights, verify, write_folder

IGNORE = -100  # a target that is not counted
LOSS_LOGITS = 2**22  # logits held at once for the loss: 16 MB, in and out of a CPU's cache
LOSS_LOGITS_GPU = 2**27  # on a GPU 0.5 GB: 4,194 tokens of Amber, enough rows to keep it busy
PEAK_FLOPS = {  # dense bfloat16 FLOP/s by the makers' data sheets; the longer name first
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "A100": 312e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12}
DRAWN = 2**18  # weights drawn at once: 1 MB, in and out of a core's cache

aten = torch.ops.aten
COSTLY = [  # of a block: what recompute = "selective" keeps, all the rest is cheap to do again
    aten.mm.default, aten.addmm.default, aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default]

Cache = list[tuple[torch.Tensor, torch.Tensor]]  # per layer: keys, values (B, H_kv, seq_len, D)


# ---- the parametrisation: muP in one table -------------------------------------------------------

@dataclass(frozen=True)
class TensorClass:
    """What one kind of tensor gets from the parametrisation."""
    std: float | None  # of the initial weights; None: ones
    lr_mult: float  # times the learning rate
    decays: bool  # takes part in weight decay
    forward: float = 1.0  # times its output


def tensor_classes(config: ModelConfig) -> dict[str, TensorClass]:
    """Class of tensor -> what it gets. The forward pass, init and optimizer groups all read it.

    muP (arXiv 2203.03466, table 8) keeps the size of every activation, and of its change in a step
    of Adam, the same at every width. Adam moves each entry by about lr, and all C entries of a row
    move together with their input: so a matrix inside wants lr / m. What is read one entry at a
    time, embedding, biases, norms, wants lr. The tied head sums C products: alpha / m. One factor
    is no tensor's, the scale of attention: 1/D with muP, and it stands in Attention.

    Without muP this is Amber's recipe, the same table with m = 1: one std, and decay on everything.
    With it, CrystalCoder's (params.yaml): what leads into the residual stream starts smaller by
    sqrt(2 L), the number of terms in it (GPT-2's rule), and norms and biases do not decay.
    """
    mup, std = config.mup_base_width is not None, config.init_std
    m = config.n_embd / config.mup_base_width if mup else 1.0
    inside = std / math.sqrt(m)
    return {
        # std, learning rate, decay, forward
        "embedding": TensorClass(std, 1.0, True, config.mup_emb_mult),
        "in": TensorClass(inside, 1 / m, True),  # q, k, v, gate, up
        "out": TensorClass(inside / math.sqrt(2 * config.n_layer) if mup else inside, 1 / m, True),
        "head": TensorClass(std, 1.0, True, config.mup_alpha / m),  # tied: only its `forward`
        "norm": TensorClass(None, 1.0, not mup),
        "bias": TensorClass(0.0, 1.0, not mup),
    }


def class_of(name: str) -> str:
    """The tensor class of a parameter, by its name and the module that holds it."""
    module, kind = name.split(".")[-2:]
    if kind == "bias":
        return "bias"
    patterns = {"embedding": "embed_tokens", "head": "lm_head", "in": "(q|k|v|gate|up)_proj",
                "out": "(o|down)_proj", "norm": ".*norm"}
    found = [one for one, pattern in patterns.items() if re.fullmatch(pattern, module)]
    assert found, f"no class claims the parameter {name}"
    return found[0]


def draw(p: torch.Tensor, std: float, cut: bool, generator: torch.Generator) -> None:
    """Fill p from a normal distribution; `cut`: drawn again until within 2 std (real std 0.88).

    In fp32 on the CPU, since other devices have other generators. Drawing again costs a twentieth
    of the draws; the inverse of the distribution function would cost several times all.
    """
    for part in p.view(-1).split(DRAWN):
        x = torch.empty(part.shape).normal_(generator=generator)
        far = (x.abs() > 2).nonzero()[:, 0] if cut else []
        while len(far):
            x[far] = torch.empty(len(far)).normal_(generator=generator)
            far = far[x[far].abs() > 2]
        part.copy_(x.mul_(std))


def my_part(p: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """What of a whole tensor belongs into p: all of it, or this rank's shard of a DTensor."""
    whole = whole.to(p.device, p.dtype)
    if not isinstance(p, DTensor):
        return whole
    # None: nobody sends anything, every rank has the whole and cuts out its own
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()


def local(p: torch.Tensor) -> torch.Tensor:
    """The values of p that this rank holds."""
    return p.to_local() if isinstance(p, DTensor) else p


@torch.no_grad()
def init_weights(model: "Transformer", seed: int) -> None:
    """Fill every parameter from (seed, its name) alone: the same on any device and layout.

    A sharded one is drawn whole and cut: drawn in shards, other weights would come of each layout.
    """
    classes = tensor_classes(model.config)
    for name, p in model.named_parameters():
        std = classes[class_of(name)].std
        if not std:
            p.fill_(1.0 if std is None else 0.0)
            continue
        # torch's generator looks at the low 32 bits of a seed alone: seed and name go into them
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        whole = torch.empty(p.shape)  # one at a time: the largest of a 7B model is 0.5 GB
        draw(whole, std, model.config.mup_base_width is not None, generator)
        local(p).copy_(my_part(p, whole))


def param_groups(model: "Transformer", weight_decay: float) -> list[dict]:
    """AdamW's groups: {params, names, lr_mult, weight_decay}, every parameter in exactly one."""
    groups, classes = {}, tensor_classes(model.config)
    for name, p in model.named_parameters():
        one = classes[class_of(name)]
        group = groups.setdefault((one.lr_mult, one.decays), dict(
            params=[], names=[], lr_mult=one.lr_mult,
            weight_decay=weight_decay if one.decays else 0.0))
        group["params"].append(p)
        group["names"].append(name)
    named = [name for group in groups.values() for name in group["names"]]
    assert sorted(named) == sorted(n for n, _ in model.named_parameters()), named
    return list(groups.values())


# ---- forward -------------------------------------------------------------------------------------

def rope_tables(config: ModelConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin of every position's angles, each (seq_len, r), float32."""
    # In bfloat16 the angles themselves would be wrong: 2047 is not a bfloat16 number.
    r = config.rotary_dim or config.n_embd // config.n_head
    freq = config.rope_theta ** -(torch.arange(0, r, 2, device=device, dtype=torch.float32) / r)
    angle = torch.outer(torch.arange(config.seq_len, device=device, dtype=torch.float32), freq)
    cos, sin = angle.cos(), angle.sin()  # (seq_len, r/2); both of a pair turn by one angle
    if config.rope_interleaved:
        return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(1)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
           ) -> torch.Tensor:
    """Turn the first r dimensions of x (B, H, T, D) by their positions' angles (T, r).

    Pairs are (0, 1), (2, 3), ... if interleaved (CrystalCoder), else i and i + r/2 (LLaMA).
    """
    r = cos.size(-1)
    u = x[..., :r].float()
    a, b = (u[..., ::2], u[..., 1::2]) if interleaved else u.chunk(2, dim=-1)
    partner = torch.stack((b, a), -1).flatten(-2) if interleaved else torch.cat((b, a), -1)
    u = (u * cos + partner * sin).to(x.dtype)
    return u if r == x.size(-1) else torch.cat((u, x[..., r:]), -1)


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with weight and bias."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.norm == "layer" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Statistics in fp32 whatever comes in; the weight is multiplied in fp32 too and the cast
        # comes last, as in amber-train.
        C, weight = (x.size(-1),), self.weight.float()
        if self.bias is None:
            return F.rms_norm(x.float(), C, weight, self.eps).to(x.dtype)
        return F.layer_norm(x.float(), C, weight, self.bias.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, D = config.n_embd, config.n_embd // config.n_head
        C_kv, bias = D * (config.n_kv_head or config.n_head), config.bias
        self.D, self.interleaved = D, config.rope_interleaved
        # muP: queries and keys come to agree in training, and then q.k grows like D, not its root
        self.scale = 1 / D if config.mup_base_width else 1 / math.sqrt(D)
        self.q_proj = nn.Linear(C, C, bias)
        self.k_proj = nn.Linear(C, C_kv, bias)
        self.v_proj = nn.Linear(C, C_kv, bias)
        self.o_proj = nn.Linear(C, C, bias)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                cache: tuple[torch.Tensor, torch.Tensor] | None, start: int,
                mask: torch.Tensor | None) -> torch.Tensor:
        B, T, _ = x.shape
        # (B, T, H*D) -> (B, H, T, D); -1 for H, so that a head-sharded projection fits as well
        q, k, v = (proj(x).view(B, T, -1, self.D).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin, self.interleaved), rotate(k, cos, sin, self.interleaved)
        if cache is not None:
            keys, values = cache
            keys[:, :, start:start + T], values[:, :, start:start + T] = k, v
            k, v = keys[:, :, :start + T], values[:, :, :start + T]
        y = F.scaled_dot_product_attention(  # (B, H, T, D)
            q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, scale=self.scale,
            enable_gqa=k.size(1) != q.size(1))
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, config.bias)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, config.bias)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = Norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config)
        self.mlp = MLP(config)
        self.recompute = "none"  # what the backward pass computes again, see TrainConfig

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                cache: tuple[torch.Tensor, torch.Tensor] | None = None, start: int = 0,
                mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.body(x, cos, sin, cache, start, mask)
        # In here and not around the block: it is compiled with the block, and what shards the
        # block's weights has gathered them before both passes.
        keep = {} if self.recompute == "full" else {"context_fn": functools.partial(
            create_selective_checkpoint_contexts, COSTLY)}
        return checkpoint(self.body, x, cos, sin, cache, start, mask, use_reentrant=False, **keep)

    def body(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
             cache: tuple[torch.Tensor, torch.Tensor] | None, start: int,
             mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, start, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A LLaMA or a CrystalCoder. Its names are LLaMA's, such as model.layers.0.mlp.up_proj.weight.

    A tied head is no parameter of its own, so there is no tie to break on the way to a device.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.n_embd),
            layers=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            norm=Norm(config)))
        if not config.tie:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        classes = tensor_classes(config)
        self.emb_mult, self.head_mult = classes["embedding"].forward, classes["head"].forward
        self.set_tables()

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, C): the head's own matrix, or the embedding."""
        return self.model["embed_tokens"].weight if self.config.tie else self.lm_head.weight

    def set_tables(self) -> None:
        """(Re)compute the rotary tables where the weights are. They are no part of a checkpoint.

        Again after to_empty(), which leaves anything in them, and after to(dtype), which rounds
        them; from_pretrained() does so.
        """
        cos, sin = rope_tables(self.config, next(self.parameters()).device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def mask(self, T: int, start: int, pads: torch.Tensor | None) -> torch.Tensor | None:
        """What T new tokens see of `start` old ones and themselves, True for yes; None: no mask.

        SDPA's is_causal aligns to the top left, so it is right only without a past; one new token
        sees all of its past. With pads (B,), the first ids of a row that are not there: (B, 1, T,
        start + T). They see themselves, since a softmax over nothing is no number.
        """
        if pads is None and (start == 0 or T == 1):
            return None
        key = torch.arange(start + T, device=self.cos.device)
        query = key[start:, None]
        see = key <= query  # (T, start + T)
        if pads is not None:
            see = see & ((key >= pads[:, None, None, None]) | (key == query))
        return see

    def hidden(self, idx: torch.Tensor, cache: Cache | None = None, start: int = 0,
               pads: torch.Tensor | None = None) -> torch.Tensor:
        """idx (B, T) -> what the head multiplies (B, T, C), its factor alpha / m included."""
        # Times 1.0 in a LLaMA, and not left out: under tensor parallelism what the embedding gives
        # is not there yet, and a compiled block that is the first to touch it loses the gradient.
        x = self.model["embed_tokens"](idx) * self.emb_mult
        end = start + idx.size(1)
        assert end <= self.config.seq_len, f"{end} tokens, the context has {self.config.seq_len}"
        cos, sin = self.cos[start:end], self.sin[start:end]
        mask = self.mask(end - start, start, pads)
        for i, block in enumerate(self.model["layers"]):
            x = block(x, cos, sin, cache[i] if cache is not None else None, start, mask)
        # the factor here and not on the logits: C numbers a token instead of V
        return self.model["norm"](x) * self.head_mult

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                cache: Cache | None = None, start: int = 0, per_row: bool = False) -> torch.Tensor:
        """idx (B, T) int64 -> logits (B, T, V); with targets (B, T), the mean loss in nats, fp32.

        A target of IGNORE is not counted. With a cache, idx continues the `start` tokens in it.
        `per_row`: the summed loss of each row (B,) instead.
        """
        x = self.hidden(idx, cache, start)
        if targets is None:
            return F.linear(x, self.head_weight)  # (B, T, V)
        nats = row_nats(x, self.head_weight, targets)
        return nats if per_row else nats.sum() / (targets != IGNORE).sum()

    # ---- text ------------------------------------------------------------------------------------

    def new_cache(self, B: int, dtype: torch.dtype, length: int | None = None) -> Cache:
        """An empty cache for B sequences of this length, by default the context: 2 L C_kv numbers
        a token, allocated once."""
        c = self.config
        shape = (B, c.n_kv_head or c.n_head, length or c.seq_len, c.n_embd // c.n_head)
        return [(torch.zeros(shape, dtype=dtype, device=self.cos.device),
                 torch.zeros(shape, dtype=dtype, device=self.cos.device))
                for _ in range(c.n_layer)]

    @torch.inference_mode()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
               top_k: int = 0, top_p: float = 1.0, stop: Sequence[int] = (),
               lengths: torch.Tensor | None = None,
               generator: torch.Generator | None = None) -> Iterator[torch.Tensor]:
        """Continue idx (B, T) and yield each step's tokens (B,) as they are made.

        temperature 0 is greedy; top_k 0, top_p 0 or 1 are off. A sequence that has made one of the
        `stop` ids repeats it, and the stream ends when all have. Prompts of different lengths stand
        at the right end of idx, see align(). A full context goes on from its last half, read again.
        """
        device, T_max = idx.device, self.config.seq_len
        cast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if cast else self.head_weight.dtype
        length = min(T_max, idx.size(1) + max_new_tokens)
        cache, start, made = self.new_cache(idx.size(0), dtype, length), 0, [idx]
        all_pads = None if lengths is None else idx.size(1) - lengths.to(device)  # (B,)
        idx, pads = window(made, T_max, all_pads)
        head = self.head_weight  # (V, C)
        if device.type == "cpu" and len(idx) == 1 and dtype == torch.float32:
            head = head.t().contiguous().t()  # a copy by columns: one row times it is twice as fast
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=device)
        ends = torch.tensor(stop, dtype=torch.int64, device=device)
        for _ in range(max_new_tokens):
            if start + idx.size(1) > T_max:
                (idx, pads), start = window(made, max(1, T_max // 2), all_pads), 0
            x = self.hidden(idx, cache, start, pads)[:, -1]  # the head is for the last token only
            start += idx.size(1)
            new = pick(F.linear(x, head), temperature, top_k, top_p, generator)  # (B,)
            if stop:
                new = torch.where(done, made[-1][:, -1], new)
                done = done | torch.isin(new, ends)
            yield new
            if stop and done.all():
                return
            idx = new[:, None]
            made.append(idx)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, stop: Sequence[int] = (),
                 lengths: torch.Tensor | None = None,
                 generator: torch.Generator | None = None) -> torch.Tensor:
        """stream, collected: idx (B, T) -> (B, T + new tokens)."""
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, stop, lengths, generator)
        return torch.cat([idx, *(tokens[:, None] for tokens in new)], dim=1)

    # ---- folders ---------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu",
                        dtype: torch.dtype = torch.float32) -> "Transformer":
        """Read a folder of ours or of Hugging Face's, LLaMA or CrystalCoder; weights become dtype.

        A checkpoint of ours is verified against the hashes in its state.json first. In memory are
        at most the model and one file of weights. Raises Stop(CHECKPOINT) for a folder that is
        incomplete, changed, or of an architecture this file does not have.
        """
        folder = Path(folder)
        verify(folder)
        with torch.device("meta"):  # shapes only: the weights come from the files
            model = cls(read_config(folder)).to(dtype)
        model.to_empty(device=device)
        model.load_weights(folder)
        model.set_tables()
        return model

    @torch.no_grad()
    def load_weights(self, folder: Path) -> None:
        """Fill the parameters from a folder's files, or those that this rank holds, or its shards
        of them. In memory is one tensor besides. Raises Stop(CHECKPOINT)."""
        mine, seen = dict(self.named_parameters()), set()
        for name, whole, where in read_weights(folder, self.config, shapes_of(self.config)):
            if name not in mine:  # another stage's of a pipeline
                continue
            p, part = local(mine[name]), my_part(mine[name], whole)
            if name in seen and not torch.equal(p, part):
                raise Stop(CHECKPOINT, f"{where} is {name} once more, the head of a tied embedding "
                           "or given twice, but the two differ")
            p.copy_(part)
            seen.add(name)

    def save_pretrained(self, folder: str | Path, bos: int | None = None, eos: int | None = None,
                        dtype: torch.dtype = torch.float32, max_shard_gb: float = 5.0) -> None:
        """Write config.json and the weights as dtype, files of max_shard_gb (10^9 bytes).

        All-LLaMA switches give a LlamaForCausalLM, all-CrystalCoder ones the published names and
        layouts, any mixture a folder that only we read. bos and eos are token ids; without them
        Hugging Face would assume LLaMA's 1 and 2. Raises Stop(CHECKPOINT) where weights lie
        already. A folder that must be whole or absent is renamed by the caller.
        """
        tokens = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": None}
        ours = dict(self.named_parameters())
        write_folder(Path(folder), self.config, shapes_of(self.config),
                     lambda names: {name: ours[name] for name in names}, tokens, dtype,
                     max_shard_gb)


def row_nats(x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed loss of each row, from x (B, T, C), head (V, C), targets (B, T) -> (B,) fp32.

    All logits at once would be the largest tensor of the step, three times over (fp32 and gradients
    too). So the head runs on few tokens at a time and again in the backward pass.
    """
    (B, T), n = targets.shape, LOSS_LOGITS_GPU if x.is_cuda else LOSS_LOGITS
    n = max(1, n // head.size(0))
    nats = [checkpoint(token_nats, a, head, b, use_reentrant=False)
            for a, b in zip(x.flatten(0, 1).split(n), targets.flatten().split(n), strict=True)]
    return torch.cat(nats).view(B, T).sum(1)


def token_nats(x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each token, x (n, C) -> (n,). In fp32: in bfloat16 it has three digits."""
    return F.cross_entropy(F.linear(x, head).float(), targets, ignore_index=IGNORE,
                           reduction="none")


def align(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts of any lengths -> idx (B, T), each at the right end, and lengths (B,) for stream."""
    lengths = [len(prompt) for prompt in prompts]
    T = max(lengths)
    idx = torch.tensor([[0] * (T - len(one)) + [*one] for one in prompts], dtype=torch.int64)
    return idx, None if min(lengths) == T else torch.tensor(lengths)  # None: no mask is needed


def window(made: list[torch.Tensor], n: int, pads: torch.Tensor | None
           ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The last n of all ids, pieces of (B, any), and how many of a row's are still padding."""
    idx = torch.cat(made, dim=1)
    cut = max(0, idx.size(1) - n)
    pads = None if pads is None else (pads - cut).clamp(min=0)
    return idx[:, cut:], pads if pads is not None and pads.any() else None


def pick(logits: torch.Tensor, temperature: float, top_k: int, top_p: float,
         generator: torch.Generator | None) -> torch.Tensor:
    """Draw one token of logits (B, V) -> (B,): the best of them, or one of the top k and p."""
    if temperature < 1e-5:  # dividing by less would overflow, and says the same
        return logits.argmax(dim=-1)
    V, ids = logits.size(-1), None
    if 0 < top_k < V or 0 < top_p < 1:  # the best first, and softmax of k only
        logits, ids = logits.topk(min(top_k or V, V))
    p = (logits.float() / temperature).softmax(dim=-1)
    if 0 < top_p < 1:  # the smallest set of best tokens that holds top_p of the probability
        p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0.0)  # never the best one
    drawn = torch.multinomial(p, 1, generator=generator)
    return (drawn if ids is None else ids.gather(-1, drawn))[:, 0]


def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Parameter -> shape, of the whole model; nothing is allocated."""
    with torch.device("meta"):
        return {name: p.shape for name, p in Transformer(config).named_parameters()}


def parameters(config: ModelConfig) -> int:
    """How many there are in the whole model; a tied matrix is counted once."""
    return sum(shape.numel() for shape in shapes_of(config).values())


# ---- cost and device -----------------------------------------------------------------------------

def flops_per_token(config: ModelConfig) -> float:
    """Forward and backward FLOPs of one trained token: 6 N_mm + 12 L C T.

    N_mm counts the matrices that multiply, head included, embedding lookup not. Attention is
    counted as the full square, as PaLM and nanoGPT do; causal kernels do half of it.
    """
    L, C, F_, V = config.n_layer, config.n_embd, config.n_inner, config.vocab_size
    C_kv = C // config.n_head * (config.n_kv_head or config.n_head)
    N_mm = L * (2 * C * C + 2 * C * C_kv + 3 * C * F_) + V * C
    return 6 * N_mm + 12 * L * C * config.seq_len


def choose_device(want: str) -> torch.device:
    """auto: the best there is; else what was asked for. Raises Stop if that is not there."""
    have = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    have += ["cpu"]
    if want not in ("auto", *have):
        raise Stop(ENVIRONMENT, f"device={want}, but torch finds only {', '.join(have)} here; give "
                   "--device=auto")
    return torch.device(have[0] if want == "auto" else want)


def hardware(device: torch.device) -> str:
    """What computes, for a run's record: a kind of machine, never the name of one."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s by the maker's data sheet, for MFU; None for a device not known."""
    name = hardware(device)
    return next((flops for one, flops in PEAK_FLOPS.items() if re.search(rf"\b{one}\b", name)),
                None)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else rss * 1024
