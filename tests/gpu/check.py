"""Numbers that need a GPU: types, kernels, compile, FSDP2, recompute, cache, resume, memory.

    bash tests/gpu/run.sh check                        # on a CUDA device, within nine minutes
    bash tests/gpu/run.sh check --tiny --device=cpu    # the same code at toy sizes
    bash tests/gpu/run.sh check --only=resume          # rows by name, in a file of their own

In this process: cut-down Amber and CrystalCoder, same weights, same rows, one way of computing
against another. What is compared: `loss`, the relative difference of the mean loss; `norm`, of the
gradient's norm; `worst`, the largest of any one parameter's gradient norm; `grads`, the distance of
all gradients, |a - b| / |b|. `wanted` says the bounds of a row; `same_bits` only tells, except for
runs with deterministic algorithms. In processes of their own: train.py on a data set of
prepare.py's, in one go and in two.

Reads configs/; works in a temporary folder; writes what rows.py says.
"""

import math
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rows import Options, Part, begin, config_of, lines_of, release, stage  # finds the repository
from steps import Sharded, Steps, alone
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import evaluate
import train
from model import Transformer, init_weights
from nano360.config import Config, run
from nano360.files import sha256_file
from nano360.layout import Layout
from nano360.place import Clock, Place
from nano360.scale.plan import memory

FILES = {"amber": "configs/amber_100m.py", "crystalcoder": "configs/crystalcoder_7b_stage1.py"}
# Heads of 128 as both originals have; tiny: of 64. Widths are multiples of CrystalCoder's base.
SMALL = dict(n_layer=4, n_head=4, n_embd=512, n_inner=1376, vocab_size=8192, seq_len=1024,
             batch_size=4, micro_batch_size=2)
LARGE = dict(n_layer=8, n_head=16, n_embd=2048, n_inner=5632, vocab_size=32000, seq_len=2048,
             batch_size=8, micro_batch_size=4)  # for memory: what is small would drown in the rest
TINY = dict(n_layer=2, n_head=2, n_embd=128, n_inner=344, vocab_size=512, seq_len=64,
            batch_size=4, micro_batch_size=2)

# Largest relative differences that rounding explains. bf16 has 8 bits: 2^-9 = 0.2 % a number, which
# the mean over thousands of tokens evens out; fp32 has 24, and sums in another order.
BF16 = dict(loss=2e-3, norm=2e-2, worst=5e-2, grads=5e-2)
BF16_SAME = dict(loss=1e-3, norm=1e-2, worst=3e-2, grads=3e-2)  # bf16 in both, rounded elsewhere
FP32 = dict(loss=1e-5, norm=1e-4, worst=1e-3, grads=1e-3)


@dataclass
class Outcome:
    """What a batch gives: the mean loss, and the gradient of every parameter."""
    loss: float
    grads: dict[str, torch.Tensor]


# ---- one way of computing against another --------------------------------------------------------

def cut_down(part: Part, family: str, **keys: object) -> Config:
    size = TINY if part.options.tiny else SMALL
    return config_of(FILES[family], size | {"recompute": "none"} | keys)


def some_rows(config: Config) -> np.ndarray:
    """(batch_size, seq_len + 1) ids, the same at every call."""
    shape = (config.optim.batch_size, config.model.seq_len + 1)
    return np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.uint16)


def place_of(part: Part, dtype: torch.dtype, compiled: bool, mesh: object = None) -> Place:
    kind = Place if mesh is None else Sharded
    return kind(0, 1, part.device, dtype, compiled, mesh)


def outcome(config: Config, place: Place) -> Outcome:
    """Gradients of one batch by train.py's own functions."""
    release(place.device)
    with torch.device("meta"):
        model = Transformer(config.model)
    runner = train.parallelize(model, place, config)
    init_weights(model, 0)
    if isinstance(place, Sharded):
        assert all(isinstance(p, DTensor) for p in model.parameters()), "nothing was sharded"
    clock = Clock(place.device)
    clock.start()
    loss = train.forward_backward(runner, some_rows(config), config.optim.micro_batch_size, place,
                                  clock)
    grads = {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
             for name, p in model.named_parameters()}
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing, f"no gradient: {missing}"
    return Outcome(loss.item(), grads)


def norm_of(tensors: Iterator[torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def compare(one: Outcome, other: Outcome, bounds: dict) -> dict:
    """How far `one` is from `other`, and whether that is within the bounds."""
    total = norm_of(other.grads.values())
    norms = {name: (norm_of([one.grads[name]]), norm_of([grad]))
             for name, grad in other.grads.items()}
    # A gradient that is nearly none, as of a bias that the softmax takes out, is noise: its size
    # counts as at least a thousandth of the whole.
    worst, name = max((abs(a - b) / max(b, 1e-3 * total), name) for name, (a, b) in norms.items())
    apart = norm_of(one.grads[name] - grad for name, grad in other.grads.items())
    found = {"loss": abs(one.loss - other.loss) / other.loss,
             "norm": abs(norm_of(one.grads.values()) - total) / total,
             "worst": worst, "grads": apart / total}
    same = one.loss == other.loss and all(torch.equal(one.grads[n], g)
                                          for n, g in other.grads.items())
    return found | {"ok": all(found[k] <= bounds[k] for k in bounds), "same_bits": same,
                    "worst_of": name, "wanted": bounds_in_words(bounds)}


def bounds_in_words(bounds: dict) -> str:
    return ", ".join(f"{k} <= {v:g}" for k, v in bounds.items())


def types(part: Part, family: str) -> dict:
    """bf16 autocast against fp32, both eager."""
    config = cut_down(part, family)
    a, b = (outcome(config, place_of(part, dtype, False))
            for dtype in (torch.bfloat16, torch.float32))
    return compare(a, b, BF16) | {"loss_of": b.loss}


def compiled(part: Part, family: str, dtype: torch.dtype, recompute: str = "none") -> dict:
    """torch.compile of each block against eager."""
    config = cut_down(part, family, recompute=recompute)
    a, b = (outcome(config, place_of(part, dtype, way)) for way in (True, False))
    return compare(a, b, FP32 if dtype == torch.float32 else BF16_SAME)


def recomputed(part: Part, recompute: str, dtype: torch.dtype) -> dict:
    """Activation checkpointing against none, eager: the same operations twice, so the same bits,
    but for kernels whose sums have no order (flash attention's backward pass on a GPU)."""
    a, b = (outcome(cut_down(part, "amber", recompute=way), place_of(part, dtype, False))
            for way in (recompute, "none"))
    return compare(a, b, FP32 if dtype == torch.float32 else BF16_SAME)


def kernel(part: Part, family: str, backend: SDPBackend, dtype: torch.dtype) -> dict:
    """A whole model whose attention may only use one kernel, against the math path. That it does
    not raise says that the model's own call, its strides and scale, suits the kernel."""
    config, place = cut_down(part, family), place_of(part, dtype, False)
    with sdpa_kernel(backend):
        a = outcome(config, place)
    with sdpa_kernel(SDPBackend.MATH):
        b = outcome(config, place)
    return compare(a, b, FP32 if dtype == torch.float32 else BF16_SAME)


def fsdp(part: Part, dtype: torch.dtype, compile: bool) -> dict:
    """FSDP2 over one rank against none: in bf16 FSDP2 casts weights where autocast casts inputs."""
    config = cut_down(part, "amber", recompute="selective")
    with alone(part.device) as mesh:
        a = outcome(config, place_of(part, dtype, compile, mesh))
    b = outcome(config, place_of(part, dtype, compile))
    return compare(a, b, FP32 if dtype == torch.float32 else BF16)


# ---- attention alone -----------------------------------------------------------------------------

def attention(part: Part, backend: SDPBackend, dtype: torch.dtype, D: int, kv_heads: int,
              bound: float) -> dict:
    """Output and gradients of one kernel against the math path in fp32, on the same numbers."""
    H, T = (4, 64) if part.options.tiny else (16, 2048)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(2, heads, T, D, generator=generator).to(part.device, dtype)
                   for heads in (H, kv_heads or H, kv_heads or H, H))

    def pass_(backend: SDPBackend, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=bool(kv_heads))
        return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(dtype))]
    names = ("y", "dq", "dk", "dv")
    exact = pass_(SDPBackend.MATH, torch.float32)
    found = {name: norm_of([a.float() - b]) / norm_of([b]) for name, a, b in
             zip(names, pass_(backend, dtype), exact, strict=True)}
    return found | {"ok": max(found.values()) <= bound, "wanted": f"each <= {bound:g}"}


def chosen_kernel(part: Part) -> dict:
    """Which kernel torch takes of itself in bf16 with heads of 128: the one whose bits it gives."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 256, 128, generator=generator).to(part.device, torch.bfloat16)
               for _ in range(3))

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mine, found = forward(), {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION,
                    SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        try:
            with sdpa_kernel(backend):
                found[backend.name] = "same bits" if torch.equal(forward(), mine) else "other bits"
        except RuntimeError:  # torch's word for "No available kernel"
            found[backend.name] = "not there"
    return {"said": ", ".join(f"{name} {what}" for name, what in found.items())}


# ---- text ----------------------------------------------------------------------------------------

def greedy(part: Part, family: str) -> dict:
    """Greedy text by the cache, fp32, against one forward pass over it without a cache.

    Every token that was chosen is the best one there, or so near it that only rounding tells them
    apart; and the logits that come token by token are those of the pass.
    """
    config = cut_down(part, family).model
    model = Transformer(config)
    init_weights(model, 0)
    model.to(part.device)
    first, new = config.seq_len // 8, config.seq_len // 4
    idx = torch.randint(config.vocab_size, (4, first), generator=torch.Generator().manual_seed(1))
    text = model.generate(idx.to(part.device), new, temperature=0)
    cache = model.new_cache(4, torch.float32)
    with torch.no_grad():
        logits = model(text[:, :-1])[:, first - 1:]  # (B, new, V)
        parts = [model(text[:, :first], cache=cache)[:, -1:]]
        parts += [model(text[:, at:at + 1], cache=cache, start=at)
                  for at in range(first, first + new - 1)]
    chosen = logits.gather(-1, text[:, first:, None])[..., 0]
    size, equal = logits.std().item(), (logits.argmax(-1) == text[:, first:])
    gap = (logits.amax(-1) - chosen).max().item() / size
    apart = (torch.cat(parts, 1) - logits).abs().max().item() / size
    return {"ok": max(gap, apart) <= 1e-4, "tokens": equal.numel(), "equal": int(equal.sum()),
            "gap": gap, "apart": apart, "wanted": "gap, apart <= 0.0001 of the logits' deviation"}


def scores(part: Part, family: str) -> dict:
    """Choices scored in batches, what they have in common run once, fp32, against one forward pass
    over each sequence alone."""
    config = cut_down(part, family).model
    model = Transformer(config)
    init_weights(model, 0)
    model.to(part.device)
    rng, groups = np.random.default_rng(1), []
    for _ in range(12):  # questions of four choices, contexts and choices of any length
        front = rng.integers(config.vocab_size, size=rng.integers(1, config.seq_len // 2))
        lengths = rng.integers(1, config.seq_len // 4, size=4)
        groups.append([(np.concatenate([front, rng.integers(config.vocab_size, size=K)]), int(K))
                       for K in lengths])
    place = Place(0, 1, part.device, torch.float32, compile=False)
    options = evaluate.EvaluateOptions(tasks="", batch_size=5)
    ckpt = evaluate.Checkpoint(Path(family), model, None, False, config.seq_len, options, place)
    found, worst = evaluate.score(ckpt, groups, family), 0.0
    for group, lls in zip(groups, found, strict=True):
        for (ids, K), ll in zip(group, lls, strict=True):
            idx = torch.from_numpy(ids)[None].to(part.device)
            with torch.no_grad():
                logits = model(idx[:, :-1])[0, -K:].double()
            alone = logits.log_softmax(-1).gather(1, idx[0, -K:, None]).sum().item()
            worst = max(worst, abs(ll - alone) / max(4e-4, 2e-6 * abs(alone)))
    return {"ok": worst <= 1, "choices": 48, "worst": worst,
            "wanted": "worst <= 1, in units of 4e-4 nats or 2e-6 of the number"}


# ---- memory --------------------------------------------------------------------------------------

def peak_of_step(config: Config, place: Place) -> tuple[int, int]:
    """Bytes at the peak of an optimizer step, and of what is there all the time: fp32 weights,
    gradients and both moments."""
    release(place.device)
    cuda = place.device.type == "cuda"
    before = torch.cuda.memory_allocated(place.device) if cuda else 0
    steps = Steps(config, place)
    for _ in range(2):  # the first one compiles, and makes the moments
        if cuda:
            torch.cuda.reset_peak_memory_stats(place.device)
        steps.take()
    peak = torch.cuda.max_memory_allocated(place.device) - before if cuda else 0
    return peak, 16 * sum(p.numel() for p in steps.model.parameters())


def estimate(part: Part, family: str, compile: bool, recompute: str) -> dict:
    """plan.py's bill against the allocator's. All but weights, gradients and moments, which
    are exact, has to be within 15 %: activations, casts of weights, what lives for a moment."""
    config = cut_down(part, family, recompute=recompute, **({} if part.options.tiny else LARGE))
    bill = memory(config, Layout(1, 1, 1, 1, 1, 1), True, compile)
    peak, fixed = peak_of_step(config, place_of(part, torch.bfloat16, compile))
    assert fixed == bill["weights"] + bill["gradients"] + bill["optimizer"], (fixed, bill)
    told = {f"{kind}_gb": n / 1e9 for kind, n in bill.items()
            if kind in ("activations", "casts", "scratch")}
    guess = sum(bill.values()) - fixed
    if not peak:
        return told | {"said": "a CPU has no allocator to ask"}
    ratio = guess / (peak - fixed)
    return told | {"ok": abs(ratio - 1) <= 0.15, "fixed_gb": fixed / 1e9,
                   "estimate_gb": guess / 1e9, "measured_gb": (peak - fixed) / 1e9,
                   "ratio": ratio, "of_all": (guess + fixed) / peak, "wanted": "ratio 0.85 to 1.15"}


# ---- a run that is stopped -----------------------------------------------------------------------

EAGER, STRICT = ("--compile=false",), "tests/gpu/deterministic.py"
WAYS = [  # to run: name, whether the same bits are wanted, script, keys, whether caches are cold
    ("as it is", False, "train.py", (), False),
    ("eager, deterministic", True, STRICT, EAGER, False),
    ("deterministic", True, STRICT, (), False),
    ("eager", False, "train.py", EAGER, False),
    ("cold compile caches", False, "train.py", (), True),
]
RUN = """
sources = [dict(name="words", path="words.txt")]
vocab_size = 1024
n_layer = {n_layer}
n_head = 4
n_embd = {n_embd}
n_inner = {n_inner}
seq_len = {seq_len}
n_chunks = 2
rows_per_chunk = 64
lr = 1e-3
warmup_steps = 2
batch_size = 8
micro_batch_size = 4
"""


def write_words(path: Path, n: int) -> None:
    """Lines of made-up words, enough different ones for a tokenizer of 1,024 pieces."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    known = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(2000)]
    words = rng.choice(known, n)
    path.write_text("\n".join(" ".join(words[i:i + 12]) for i in range(0, n, 12)), "utf-8")


def make_data(part: Part, folder: Path) -> None:
    """words.py and its prepared data."""
    size = dict(n_layer=2, n_embd=64, n_inner=172, seq_len=64) if part.options.tiny else dict(
        n_layer=4, n_embd=512, n_inner=1376, seq_len=512)
    write_words(folder / "words.txt", 6_000 if part.options.tiny else 60_000)
    (folder / "words.py").write_text(RUN.format(**size))
    stage(part, folder, "prepare.py", "words.py")


def tensors_of(out: Path) -> dict[str, str]:
    """sha256 of the weights and moments of every checkpoint of a run."""
    return {p.relative_to(out).as_posix(): sha256_file(p)
            for p in sorted(out.glob("ckpt_*/**/*.safetensors"))}


def resume(part: Part, folder: Path, name: str, wanted: bool, script: str, *argv: str,
           cold: bool = False) -> dict:
    """16 steps in one go, and in two with a stop inside a visit: are the bits the same?"""
    device = f"--device={part.device.type}"
    if not (folder / "data").exists():
        make_data(part, folder)

    def go(to: str, *more: str) -> str:
        caches = tempfile.mkdtemp(dir=folder) if cold else None
        env = {"TORCHINDUCTOR_CACHE_DIR": caches} if cold else {}
        return stage(part, folder, script, "words.py", f"--run={name}_{to}", device, *argv, *more,
                     **env)
    go("whole")
    go("parts", "--max_steps=5")
    assert "going on from" in go("parts")
    whole, parts = (folder / "out" / f"{name}_{to}" for to in ("whole", "parts"))
    a, b = tensors_of(whole), tensors_of(parts)
    assert a.keys() == b.keys() and len(a) >= 4, (a, b)
    one, two = lines_of(whole, "train"), lines_of(parts, "train")
    rows_equal = [x["rows"] for x in one] == [x["rows"] for x in two]
    first = next((x["step"] for x, y in zip(one, two, strict=True) if x["loss"] != y["loss"]), None)
    apart = max(abs(x["loss"] - y["loss"]) / x["loss"] for x, y in zip(one, two, strict=True))
    held = a == b
    ok = rows_equal and apart < 1e-2 and (held or not wanted)
    return {"ok": ok, "same_bits": held, "rows_equal": rows_equal, "loss": apart,
            "first_other_loss": first or "none", "sha256": next(iter(a.values()))[:16],
            "wanted": f"the same rows, loss <= 0.01{', the same bits' * wanted}"}


# ---- the whole list ------------------------------------------------------------------------------

def numbers(part: Part) -> None:
    """One way of computing against another, what is cheap first."""
    half, full = torch.bfloat16, torch.float32
    flash, efficient = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    cuda = part.device.type == "cuda"
    for D in (64, 128):
        for kv in (0, 2):  # 0: as many key and value heads as query heads
            name = f"D {D}{f', {kv} kv heads' * bool(kv)}"
            # bf16 operands are right to 2^-9 each, and dq adds up T of them
            part.row(f"flash attention bf16, {name}",
                     lambda D=D, kv=kv: attention(part, flash, half, D, kv, 1e-2), 10)
    part.row("attention of itself", lambda: chosen_kernel(part), 5)
    # tf32, which would be a silent loss of digits, is wrong by 3e-4
    part.row("efficient attention fp32, D 128", lambda: attention(
        part, efficient if cuda else flash, full, 128, 0, 1e-4), 10)
    for family in FILES:
        part.row(f"bf16 against fp32, {family}", lambda f=family: types(part, f), 10)
        part.row(f"flash against math bf16, {family}", lambda f=family: kernel(
            part, f, flash, half), 10)
        part.row(f"efficient against math fp32, {family}", lambda f=family: kernel(
            part, f, efficient if cuda else flash, full), 10)
        part.row(f"greedy text fp32, {family}", lambda f=family: greedy(part, f), 10)
        part.row(f"scored choices fp32, {family}", lambda f=family: scores(part, f), 10)
    for way in ("selective", "full"):
        part.row(f"recompute {way} fp32", lambda w=way: recomputed(part, w, full), 10)
        part.row(f"recompute {way} bf16", lambda w=way: recomputed(part, w, half), 10)
    part.row("FSDP2 of one fp32", lambda: fsdp(part, full, False), 10)
    part.row("FSDP2 of one bf16", lambda: fsdp(part, half, False), 10)


def compiles(part: Part) -> None:
    """What has to be compiled first: tens of seconds each the first time."""
    types = [(torch.bfloat16, "bf16"), (torch.float32, "fp32")]
    for family in list(FILES)[:1] if part.options.tiny else FILES:
        for dtype, name in types[:1] if part.options.tiny else types:
            part.row(f"compile {name}, {family}",
                     lambda f=family, d=dtype: compiled(part, f, d), 40)
    for way in ("selective", "full"):
        part.row(f"compile bf16, recompute {way}", lambda w=way: compiled(
            part, "amber", torch.bfloat16, w), 40)
    part.row("compile bf16, FSDP2 of one", lambda: fsdp(part, torch.bfloat16, True), 40)


def runs(part: Part, folder: Path, ways: list[tuple]) -> None:
    """train.py stopped and started, with what may decide whether the bits stay."""
    for way, wanted, script, argv, cold in ways:
        part.row(f"resume, {way}", lambda w=way, n=wanted, s=script, a=argv, c=cold: resume(
            part, folder, re.sub("[^a-z]+", "_", w), n, s, *a, cold=c), 45)


def memories(part: Part) -> None:
    ways = [("amber", True, "none"), ("amber", True, "selective"), ("amber", True, "full"),
            ("amber", False, "none"), ("amber", False, "full"), ("crystalcoder", True, "none"),
            ("crystalcoder", True, "selective")]
    for family, compile, way in ways[::3] if part.options.tiny else ways:
        name = f"memory, {family}, {'compiled' if compile else 'eager'}, recompute {way}"
        part.row(name, lambda f=family, c=compile, w=way: estimate(part, f, c, w), 40)


def main(argv: list[str]) -> None:
    part = begin("check", argv)
    if part.device.type == "cuda":
        torch.cuda.set_device(part.device)
    with tempfile.TemporaryDirectory() as name:
        numbers(part)
        compiles(part)
        runs(part, Path(name), WAYS[:2])
        memories(part)
        runs(part, Path(name), [] if part.options.tiny else WAYS[2:])
    part.end()


if __name__ == "__main__":
    sys.exit(run(main, __doc__, [Options]))
