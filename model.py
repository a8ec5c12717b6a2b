"""The model: one Transformer, its initial weights, its parameter groups, and how it makes text.

    from model import Transformer
    model = Transformer.from_pretrained("out/demo/ckpt_007")     # or any Hugging Face LLaMA folder
    logits = model(idx)                                          # (B, T) -> (B, T, V)
    loss = model(idx, targets)                                   # the mean over all targets

Reads and writes Hugging Face folders: config.json, model.safetensors (or shards and their index).
Parameter names are Hugging Face's, so what is saved here loads in transformers without conversion.

Shapes: B batch, T tokens, C = n_embd, H = n_head, D = C/H, F = n_inner, V = vocab_size. All weights
are (out, in). The equations are LLaMA's (arXiv 2302.13971), as Amber-7B used them.
"""

import hashlib
import json
import platform
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from configs import (CHECKPOINT, ENVIRONMENT, ModelConfig, Stop, fill, read_sealed,
                     sha256_file)

IGNORE = -100  # a target that is not counted
LOSS_LOGITS = 2**22  # logits held at once for the loss: 16 MB, in and out of a CPU's cache

Cache = list[tuple[torch.Tensor, torch.Tensor]]  # per layer: keys, values (B, H_kv, seq_len, D)


# ---- forward -------------------------------------------------------------------------------------

def rope_tables(config: ModelConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position's angles, each (seq_len, D), float32.

    In bfloat16 the angles themselves would be wrong: 2047 is not a bfloat16 number.
    """
    D = config.n_embd // config.n_head
    freq = config.rope_theta ** -(torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)
    angle = torch.outer(torch.arange(config.seq_len, device=device, dtype=torch.float32), freq)
    angle = torch.cat((angle, angle), dim=-1)  # both halves of a head turn by the same angles
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x (B, H, T, D) by its positions' angles (T, D): dimension i pairs with i + D/2."""
    a, b = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, C: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Statistics in fp32 whatever comes in; the weight is multiplied in fp32 too and the cast
        # comes last, as in amber-train.
        y = F.rms_norm(x.float(), (x.size(-1),), self.weight.float(), self.eps)
        return y.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, self.D = config.n_embd, config.n_embd // config.n_head
        C_kv = self.D * (config.n_kv_head or config.n_head)
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, C_kv, bias=False)
        self.v_proj = nn.Linear(C, C_kv, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                cache: tuple[torch.Tensor, torch.Tensor] | None, start: int) -> torch.Tensor:
        B, T, _ = x.shape
        # (B, T, H*D) -> (B, H, T, D); -1 for H, so that a head-sharded projection fits as well
        q = rotate(self.q_proj(x).view(B, T, -1, self.D).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(B, T, -1, self.D).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(B, T, -1, self.D).transpose(1, 2)
        if cache is not None:
            keys, values = cache
            keys[:, :, start:start + T], values[:, :, start:start + T] = k, v
            k, v = keys[:, :, :start + T], values[:, :, :start + T]
        # is_causal aligns its mask to the top left, so it is right only without a past. One new
        # token sees all of its past and needs no mask; nothing here asks for a third case.
        assert start == 0 or T == 1, (start, T)
        y = F.scaled_dot_product_attention(  # (B, H, T, D), scaled by 1/sqrt(D)
            q, k, v, is_causal=T > 1, enable_gqa=k.size(1) != q.size(1))
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                cache: tuple[torch.Tensor, torch.Tensor] | None = None,
                start: int = 0) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A LLaMA. Its module tree spells Hugging Face's names: model.layers.0.mlp.up_proj.weight."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.n_embd),
            layers=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            norm=RMSNorm(config.n_embd, config.norm_eps)))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.set_tables()

    def set_tables(self) -> None:
        """(Re)compute the rotary tables where the weights are. They are no part of a checkpoint."""
        cos, sin = rope_tables(self.config, self.lm_head.weight.device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                cache: Cache | None = None, start: int = 0) -> torch.Tensor:
        """idx (B, T) int64 -> logits (B, T, V); with targets (B, T), the mean loss in nats, fp32.

        A target of IGNORE is not counted. With a cache, idx continues the `start` tokens in it.
        """
        x = self.model["embed_tokens"](idx)  # (B, T, C)
        end = start + idx.size(1)
        cos, sin = self.cos[start:end], self.sin[start:end]
        for i, block in enumerate(self.model["layers"]):
            x = block(x, cos, sin, cache[i] if cache is not None else None, start)
        x = self.model["norm"](x)
        if targets is None:
            return self.lm_head(x)  # (B, T, V)
        # All logits at once would be the largest tensor of the step, three times over (fp32 and
        # gradients too). So the head runs on few tokens at a time and again in the backward pass.
        x, targets = x.flatten(0, 1), targets.flatten()  # (B T, C), (B T,)
        n = max(1, LOSS_LOGITS // self.config.vocab_size)
        nats = sum(checkpoint(self.summed_loss, a, b, use_reentrant=False)
                   for a, b in zip(x.split(n), targets.split(n), strict=True))
        return nats / (targets != IGNORE).sum()

    def summed_loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss of some tokens, x (n, C) -> (). fp32: in bfloat16 it has three digits."""
        return F.cross_entropy(self.lm_head(x).float(), targets, ignore_index=IGNORE,
                               reduction="sum")

    # ---- text ------------------------------------------------------------------------------------

    def new_cache(self, B: int, dtype: torch.dtype) -> Cache:
        """An empty cache for B sequences: 2 L C_kv numbers a token, allocated once."""
        c, device = self.config, self.lm_head.weight.device
        shape = (B, c.n_kv_head or c.n_head, c.seq_len, c.n_embd // c.n_head)
        return [(torch.zeros(shape, dtype=dtype, device=device),
                 torch.zeros(shape, dtype=dtype, device=device)) for _ in range(c.n_layer)]

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
               top_k: int = 0, top_p: float = 1.0, eos: int | None = None,
               generator: torch.Generator | None = None) -> Iterator[torch.Tensor]:
        """Continue idx (B, T) and yield each step's tokens (B,) as they are made.

        temperature 0 is greedy; top_k 0 and top_p 1 are off. With `eos`, a sequence that has ended
        repeats it, and the stream ends when all have. A full context goes on from its last half.
        """
        device, T_max = idx.device, self.config.seq_len
        cast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if cast else self.lm_head.weight.dtype
        cache, start = self.new_cache(idx.size(0), dtype), 0
        seen = idx = idx[:, -T_max:]
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            if start + idx.size(1) > T_max:
                idx, start = seen[:, -max(1, T_max // 2):], 0
            logits = self(idx, cache=cache, start=start)[:, -1].float()  # (B, V)
            start += idx.size(1)
            new = pick(logits, temperature, top_k, top_p, generator)  # (B,)
            if eos is not None:
                new = torch.where(done, eos, new)
                done = new == eos
            yield new
            if eos is not None and done.all():
                return
            idx = new[:, None]
            seen = torch.cat((seen, idx), dim=1)[:, -T_max:]

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, eos: int | None = None,
                 generator: torch.Generator | None = None) -> torch.Tensor:
        """stream, collected: idx (B, T) -> (B, T + new tokens)."""
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, eos, generator)
        return torch.cat([idx, *(tokens[:, None] for tokens in new)], dim=1)

    # ---- Hugging Face folders --------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: str | Path,
                        device: torch.device | str = "cpu") -> "Transformer":
        """Read a Hugging Face LLaMA folder; weights of any type become float32.

        A checkpoint of ours is verified against the hashes in its state.json first. Raises Stop for
        a folder that is incomplete, changed, or of an architecture this file does not have.
        """
        folder = Path(folder)
        verify(folder)
        with torch.device("meta"):  # shapes only: the weights come from the files
            model = cls(read_config(folder))
        shapes = {name: p.shape for name, p in model.named_parameters()}
        weights = {}
        for file in weight_files(folder):
            try:
                with safe_open(file, framework="pt", device=str(device)) as tensors:
                    for name in tensors.keys():
                        if not name.endswith("rotary_emb.inv_freq"):  # a table old files carry
                            weights[name] = tensors.get_tensor(name).float()
            except SafetensorError as error:
                raise Stop(CHECKPOINT, f"{file} is no whole safetensors file: {error}") from error
        for name in sorted(shapes.keys() | weights.keys()):
            has, needs = weights.get(name), shapes.get(name)
            if has is None or needs is None or has.shape != needs:
                raise Stop(CHECKPOINT, f"{folder}: tensor {name} is "
                           f"{'missing' if has is None else tuple(has.shape)} in the files and "
                           f"{'unknown' if needs is None else tuple(needs)} in config.json")
        model.load_state_dict(weights, assign=True)
        model.set_tables()
        return model

    def save_pretrained(self, folder: str | Path, bos: int | None = None,
                        eos: int | None = None) -> None:
        """Write config.json and model.safetensors (the weights as they are: float32 in training).

        bos and eos are token ids; without them Hugging Face would assume LLaMA's 1 and 2.
        """
        c, folder = self.config, Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = str(self.lm_head.weight.dtype).removeprefix("torch.")
        content = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": None,
            "torch_dtype": dtype, "tie_word_embeddings": False, "use_cache": True,
            "attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
            "num_key_value_heads": c.n_kv_head or c.n_head,
            "initializer_range": c.init_std,
        } | {theirs: getattr(c, ours) for theirs, ours in HF_KEYS.items()}
        (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        weights = {name: p.detach().cpu().contiguous() for name, p in self.named_parameters()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pick(logits: torch.Tensor, temperature: float, top_k: int, top_p: float,
         generator: torch.Generator | None) -> torch.Tensor:
    """Draw one token of logits (B, V) -> (B,): the best of them, or one of the top k and p."""
    if temperature < 1e-5:  # dividing by less would overflow, and says the same
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:  # the smallest set of best tokens that holds top_p of the probability
        ranked, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        drop = ranked.cumsum(dim=-1) - ranked >= top_p  # never the best one
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


# ---- initial weights, parameter groups, cost -----------------------------------------------------

def tensor_classes(config: ModelConfig) -> dict[str, tuple[float | None, float, bool]]:
    """Class of tensor -> (initial std, None for ones; learning-rate multiplier; weight decay).

    Init and optimizer groups are both read off this table. All of it is Amber's: one std with no
    depth scaling, one rate, and decay on everything, norms and embedding included.
    """
    std = config.init_std
    return {
        "embedding": (std, 1.0, True),
        "matrix": (std, 1.0, True),
        "head": (std, 1.0, True),
        "norm": (None, 1.0, True),
    }


def class_of(name: str) -> str:
    """The tensor class of a parameter, by the module that holds it."""
    module = name.split(".")[-2]
    if module == "embed_tokens":
        return "embedding"
    if module == "lm_head":
        return "head"
    if re.fullmatch("(q|k|v|o|gate|up|down)_proj", module):
        return "matrix"
    assert module.endswith("norm"), f"no class claims the parameter {name}"
    return "norm"


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fill every parameter from (seed, its name) alone: the same on any device and layout."""
    classes = tensor_classes(model.config)
    for name, p in model.named_parameters():
        std, _, _ = classes[class_of(name)]
        if std is None:
            p.fill_(1.0)
            continue
        # Drawn in fp32 on the CPU: other devices have other generators. Its generator looks at the
        # low 32 bits of a seed alone, so seed and name are hashed into them.
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=generator))


def param_groups(model: Transformer, weight_decay: float) -> list[dict]:
    """AdamW's groups: {params, names, lr_mult, weight_decay}, every parameter in exactly one."""
    groups: dict[tuple, dict] = {}
    classes = tensor_classes(model.config)
    for name, p in model.named_parameters():
        _, lr_mult, decays = classes[class_of(name)]
        group = groups.setdefault((lr_mult, decays), dict(
            params=[], names=[], lr_mult=lr_mult, weight_decay=weight_decay if decays else 0.0))
        group["params"].append(p)
        group["names"].append(name)
    named = [name for group in groups.values() for name in group["names"]]
    assert sorted(named) == sorted(n for n, _ in model.named_parameters()), named
    return list(groups.values())


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
    known = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
    return next((flops for name, flops in known.items() if name in hardware(device)), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else rss * 1024


# ---- what lies in a folder -----------------------------------------------------------------------

HF_KEYS = {  # config.json -> ours
    "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd",
    "intermediate_size": "n_inner", "vocab_size": "vocab_size",
    "max_position_embeddings": "seq_len", "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta",
}


def read_config(folder: Path) -> ModelConfig:
    """config.json of a LLaMA folder, in the old spelling of rope_theta and the new one."""
    path = folder / "config.json"
    if not path.is_file():
        raise Stop(CHECKPOINT, f"no checkpoint at {folder}: {path} is missing; expected a folder "
                   "such as out/demo/ckpt_007 or a Hugging Face LLaMA folder")
    try:
        theirs = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise Stop(CHECKPOINT, f"{path} is no json object: {error}") from error
    if theirs.get("model_type") != "llama":
        raise Stop(CHECKPOINT, f"{path}: model_type {theirs.get('model_type')!r}; only llama here")
    rope = theirs.get("rope_parameters") or {}
    theirs["rope_theta"] = rope.get("rope_theta") or theirs.get("rope_theta") or 10000.0
    scaling = theirs.get("rope_scaling") or {}
    odd = {
        "rope scaling": scaling.get("rope_type", scaling.get("type", rope.get("rope_type")))
        not in (None, "default"),
        "a tied head": theirs.get("tie_word_embeddings", False),
        "attention_bias": theirs.get("attention_bias", False),
        "mlp_bias": theirs.get("mlp_bias", False),
        f"hidden_act {theirs.get('hidden_act')}": theirs.get("hidden_act", "silu") != "silu",
        "head_dim that is not hidden_size / heads": theirs.get("head_dim") not in (
            None, (theirs.get("hidden_size") or 0) // (theirs.get("num_attention_heads") or 1)),
    }
    if any(odd.values()):
        names = ", ".join(name for name, there in odd.items() if there)
        raise Stop(CHECKPOINT, f"{path}: {names} is not supported; expected plain LLaMA")
    missing = [name for name in HF_KEYS if name not in theirs]
    if missing:
        raise Stop(CHECKPOINT, f"{path}: {', '.join(missing)} is missing")
    n_kv_head = theirs.get("num_key_value_heads") or theirs["num_attention_heads"]
    given = {ours: theirs[name] for name, ours in HF_KEYS.items()} | {
        "n_kv_head": None if n_kv_head == theirs["num_attention_heads"] else n_kv_head,
        "init_std": theirs.get("initializer_range", 0.02)}
    try:
        return fill([ModelConfig], {k: (v, str(path)) for k, v in given.items()})[0]
    except Stop as stop:  # a size that is none
        raise Stop(CHECKPOINT, str(stop)) from stop


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        found = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "none"
        raise Stop(CHECKPOINT, f"{folder}: no model.safetensors and no index of shards; pickled "
                   f"weights are not read (found: {found})")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Stop(CHECKPOINT, f"{index} is no index of shards: {error!r}") from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise Stop(CHECKPOINT, f"{index} names {name}, which is not a file in {folder}")
    return [folder / name for name in names]


def verify(folder: Path, below: str = ".") -> None:
    """Compare the files of a checkpoint of ours with the hashes in its state.json.

    Those in the folder itself, or in the one `below` it: readers of weights need no optimizer.
    A folder without state.json, such as a downloaded one, has nothing to compare with.
    """
    if not (folder / "state.json").exists() and not (folder / "state.json.sha256").exists():
        return
    for name, should in read_sealed(folder / "state.json", CHECKPOINT)["files"].items():
        path = folder / name
        if path.parent != folder / below:
            continue
        if not path.is_file() or sha256_file(path) != should:
            what = "was changed" if path.is_file() else "is missing"
            raise Stop(CHECKPOINT, f"{path} {what} since the checkpoint was written; "
                       "choose another checkpoint or copy this one again")


def checkpoint_hash(folder: str | Path) -> str:
    """What a score belongs to: one sha256 over config.json and the weights of a folder."""
    files = [Path(folder) / "config.json", *weight_files(Path(folder))]
    lines = "".join(f"{sha256_file(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()
