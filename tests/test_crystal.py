"""CrystalCoder: model.py against a second implementation of its equations, in numpy and float64.

The reference reads the published names and layouts, (in, out) matrices and q|k|v in one, so that
what maps them to ours is tested with the equations. No size or constant here has its usual value:
what is hard-coded shows.
"""

import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import REPO
from model import Transformer, init_weights, param_groups
from nano360.config import CHECKPOINT, ModelConfig, Stop, load

C, L, H, F, V, T, R = 60, 3, 5, 47, 83, 29, 6  # D = 12: half of a head rotates
M, ALPHA, EMB, EPS = 4, 1.7, 3.3, 3e-3
CONFIG = ModelConfig(n_layer=L, n_head=H, n_embd=C, n_inner=F, vocab_size=V, seq_len=T,
                     norm="layer", norm_eps=EPS, bias=True, rotary_dim=R, rope_interleaved=True,
                     tie=True, mup_base_width=C // M, mup_emb_mult=EMB, mup_alpha=ALPHA)
PUBLISHED = {
    "model_type": "crystalcoder", "n_embd": C, "n_head": H, "n_layer": L, "n_inner": F,
    "n_positions": T, "vocab_size": V, "layer_norm_epsilon": EPS, "rotary_dim": R,
    "activation_function": "swiglu", "position_embedding_type": "rotary",
    "scale_attn_weights": True, "mup_scale_qk_dot_by_d": True, "mup_width_scale": 1 / M,
    "mup_embeddings_scale": EMB, "mup_output_alpha": ALPHA, "tie_word_embeddings": True,
}


# ---- the reference -------------------------------------------------------------------------------

def layer_norm(x, g, b, eps):
    centred = x - x.mean(-1, keepdims=True)
    return g * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) + b


def rotated(u, r, theta):
    """u (B, T, H, D): the pairs (0, 1), (2, 3), .. of its first r dimensions, as complex numbers.

    Pair i of position p is multiplied by exp(1j p w_i), w_i = theta^(-2i/r).
    """
    angle = np.outer(np.arange(u.shape[1]), theta ** (-2 * np.arange(r // 2) / r))  # (T, r/2)
    turned = (u[..., 0:r:2] + 1j * u[..., 1:r:2]) * np.exp(1j * angle)[:, None]
    out = u.copy()
    out[..., 0:r:2], out[..., 1:r:2] = turned.real, turned.imag
    return out


def reference(w, idx, theta=10000.0):
    """Published tensors and tokens (B, T) -> logits (B, T, V)."""
    w = {name: a.astype(np.float64) for name, a in w.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def norm(x, name):
        return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], EPS)

    B, n = idx.shape
    x = w["transformer.wte.weight"][idx] * EMB
    for i in range(L):
        at = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn")
        q, k, v = (part.reshape(B, n, H, C // H)
                   for part in (qkv[..., :C], qkv[..., C:2 * C], qkv[..., 2 * C:]))
        q, k = rotated(q, R, theta), rotated(k, R, theta)
        scores = np.einsum("bihd,bjhd->bhij", q, k) / (C // H)
        scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share = share / share.sum(-1, keepdims=True)
        y = np.einsum("bhij,bjhd->bihd", share, v).reshape(B, n, C)
        x = x + linear(y, f"{at}.attn.c_proj")
        h = norm(x, f"{at}.ln_2")
        gate = linear(h, f"{at}.mlp.c_fc2")
        x = x + linear(linear(h, f"{at}.mlp.c_fc") * gate / (1 + np.exp(-gate)),
                       f"{at}.mlp.c_proj")
    x = norm(x, "transformer.ln_f")
    return x @ w["transformer.wte.weight"].T * (ALPHA / M)


# ---- weights and tokens --------------------------------------------------------------------------

def published() -> dict[str, np.ndarray]:
    """Random tensors under the published names, every one away from its initial value."""
    rng = np.random.default_rng(5)
    shapes = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, F),
              "mlp.c_fc2": (C, F), "mlp.c_proj": (F, C)}
    w = {"transformer.wte.weight": 0.2 * rng.standard_normal((V, C))}
    for at in [f"transformer.h.{i}" for i in range(L)]:
        for name, shape in shapes.items():
            w[f"{at}.{name}.weight"] = 0.25 * rng.standard_normal(shape)
            w[f"{at}.{name}.bias"] = 0.3 * rng.standard_normal(shape[1])
    norms = [f"transformer.h.{i}.ln_{k}" for i in range(L) for k in (1, 2)]
    for at in [*norms, "transformer.ln_f"]:
        w[f"{at}.weight"] = 1 + 0.3 * rng.standard_normal(C)
        w[f"{at}.bias"] = 0.3 * rng.standard_normal(C)
    w["lm_head.weight"] = w["transformer.wte.weight"].copy()
    return {name: a.astype(np.float32) for name, a in w.items()}


def as_ours(w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors under our names, (out, in)."""
    named = {"model.embed_tokens.weight": w["transformer.wte.weight"]}
    for kind in ("weight", "bias"):  # .T leaves a bias as it is
        named[f"model.norm.{kind}"] = w[f"transformer.ln_f.{kind}"]
        for i in range(L):
            a, b = f"model.layers.{i}", f"transformer.h.{i}"
            named[f"{a}.input_layernorm.{kind}"] = w[f"{b}.ln_1.{kind}"]
            named[f"{a}.post_attention_layernorm.{kind}"] = w[f"{b}.ln_2.{kind}"]
            for j, name in enumerate("qkv"):
                block = w[f"{b}.attn.c_attn.{kind}"][..., j * C:(j + 1) * C]
                named[f"{a}.self_attn.{name}_proj.{kind}"] = block.T
            named[f"{a}.self_attn.o_proj.{kind}"] = w[f"{b}.attn.c_proj.{kind}"].T
            named[f"{a}.mlp.gate_proj.{kind}"] = w[f"{b}.mlp.c_fc2.{kind}"].T
            named[f"{a}.mlp.up_proj.{kind}"] = w[f"{b}.mlp.c_fc.{kind}"].T
            named[f"{a}.mlp.down_proj.{kind}"] = w[f"{b}.mlp.c_proj.{kind}"].T
    return named


@torch.no_grad()
def made(config: ModelConfig, named: dict[str, np.ndarray]) -> Transformer:
    model = Transformer(config)
    for name, p in model.named_parameters():
        assert p.shape == named[name].shape, name
        p.copy_(torch.from_numpy(np.ascontiguousarray(named[name])))
    return model


def ids(B: int, n: int, vocab_size: int = V, seed: int = 3) -> torch.Tensor:
    return torch.randint(vocab_size, (B, n), generator=torch.Generator().manual_seed(seed))


def distance(model: Transformer, w: dict[str, np.ndarray], theta: float = 10000.0) -> float:
    x = ids(3, T)
    should = reference(w, x.numpy(), theta)
    assert should.std() > 0.3  # not a model of zeros
    with torch.no_grad():
        return np.abs(model(x).numpy() - should).max()


# ---- the equations -------------------------------------------------------------------------------

@pytest.mark.numeric
@pytest.mark.parametrize("theta", [10000.0, 73.0])
def test_equals_the_reference(theta):
    w = published()
    model = made(dataclasses.replace(CONFIG, rope_theta=theta), as_ours(w))
    named = {name for name, _ in model.named_parameters()}
    assert named == as_ours(w).keys()  # tied: the head is no parameter of its own
    assert distance(model, w, theta) < 1e-4


@pytest.mark.numeric
def test_loss_equals_the_reference():
    """The loss takes the head's way a second time, multiplier included."""
    w, x = published(), ids(3, T)
    logits = reference(w, x.numpy())[:, :-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, x.numpy()[:, 1:, None], axis=-1).mean()
    loss = made(CONFIG, as_ours(w))(x[:, :-1], x[:, 1:])
    assert abs(loss.item() - nats) < 1e-5


MUTANTS = {  # what a wrong reading of the equations would be, in our own switches
    "rms": dict(norm="rms"),
    "no biases": dict(bias=False),
    "rotate-half": dict(rope_interleaved=False),
    "whole head rotates": dict(rotary_dim=None),
    "theta": dict(rope_theta=5000.0),
    "1/sqrt(D)": dict(mup_base_width=None, mup_alpha=ALPHA / M),
    "eps": dict(norm_eps=10 * EPS),
    "no embedding multiplier": dict(mup_emb_mult=1.0),
    "no output multiplier": dict(mup_alpha=float(M)),
    "width not divided by": dict(mup_base_width=C),
    "alpha forgotten": dict(mup_alpha=1.0),
}


@pytest.mark.numeric
@pytest.mark.parametrize("change", MUTANTS.values(), ids=MUTANTS.keys())
def test_reference_sees_a_switch(change):
    w = published()
    assert distance(made(dataclasses.replace(CONFIG, **change), as_ours(w)), w) > 1e-3


@pytest.mark.numeric
def test_reference_sees_gate_and_up_swapped():
    w = published()
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    named = {".".join(other.get(part, part) for part in name.split(".")): a
             for name, a in as_ours(w).items()}
    assert distance(made(CONFIG, named), w) > 1e-3


# ---- folders -------------------------------------------------------------------------------------

def write(folder, w: dict[str, np.ndarray], layout: str = "bins", masks: type = torch.uint8,
          extra: dict | None = None):
    """A folder as published: config.json, the tensors in `layout`, causal masks among them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.from_numpy(a.copy()) for name, a in w.items()}
    for i in range(L):
        mask = torch.ones(T, T).tril().to(masks).view(1, 1, T, T)
        tensors[f"transformer.h.{i}.attn.bias"] = mask
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors |= extra or {}
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    kind, parts = ("bin", "pytorch_model") if "bin" in layout else ("safetensors", "model")

    def put(part: dict, name: str) -> None:
        torch.save(part, folder / name) if kind == "bin" else save_file(part, folder / name)

    if not layout.endswith("s"):
        put(tensors, f"{parts}.{kind}")
        return folder
    names, where = list(tensors), {}
    for k in range(3):
        file = f"{parts}-0000{k + 1}-of-00003.{kind}"
        put({name: tensors[name] for name in names[k::3]}, file)
        where |= dict.fromkeys(names[k::3], file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}  # no reader of ours asks
    (folder / f"{parts}.{kind}.index.json").write_text(json.dumps(index))
    return folder


LAYOUTS = ["bins", "bin", "safetensors-shards", "safetensor"]


@pytest.mark.numeric
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masks", [torch.uint8, torch.bool], ids=["uint8", "bool"])
def test_reads_a_published_folder(layout, masks, tmp_path):
    w = published()
    model = Transformer.from_pretrained(write(tmp_path, w, layout, masks))
    assert distance(model, w) < 1e-4
    named = as_ours(w)
    for name, p in model.named_parameters():
        assert np.array_equal(p.detach().numpy(), named[name]), name
    for field in dataclasses.fields(CONFIG):  # the folder does not say what the weights began as
        if field.name != "init_std":
            assert getattr(model.config, field.name) == getattr(CONFIG, field.name), field.name


@pytest.mark.parametrize("shard_gb", [5.0, 4e-5], ids=["one file", "shards"])
def test_export_gives_back_what_was_imported(shard_gb, tmp_path):
    """Published names and layouts, bit for bit, and again a folder that can be read."""
    w = published()
    model = Transformer.from_pretrained(write(tmp_path / "theirs", w))
    model.save_pretrained(tmp_path / "ours", bos=1, eos=2, max_shard_gb=shard_gb)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) == 1 if shard_gb == 5.0 else len(files) > 2
    back = {}
    for file in files:
        part = load_file(file)
        assert not back.keys() & part.keys()
        back |= part
    if len(files) > 1:
        index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == back.keys()
        assert index["metadata"]["total_size"] == sum(4 * t.numel() for t in back.values())
        assert all(name in load_file(tmp_path / "ours" / file)
                   for name, file in index["weight_map"].items())
    assert back.keys() == w.keys()
    for name, tensor in back.items():
        assert tensor.dtype == torch.float32
        assert np.array_equal(tensor.numpy(), w[name]), name
    written = json.loads((tmp_path / "ours/config.json").read_text())
    assert {name: written.get(name) for name in PUBLISHED} == PUBLISHED
    again = Transformer.from_pretrained(tmp_path / "ours")
    should = dict(model.named_parameters())
    assert should.keys() == dict(again.named_parameters()).keys()
    for name, p in again.named_parameters():
        assert torch.equal(p, should[name]), name


def test_any_base_width_comes_back(tmp_path):
    """A folder holds 1 / m, and 2 / 98 * 98 is not 2 to a float."""
    config = dataclasses.replace(CONFIG, n_embd=98, n_head=7, mup_base_width=2)
    Transformer(config).save_pretrained(tmp_path)
    assert Transformer.from_pretrained(tmp_path).config.mup_base_width == 2


def refused(folder, *words: str) -> None:
    with pytest.raises(Stop) as stop:
        Transformer.from_pretrained(folder)
    assert stop.value.code == CHECKPOINT
    for word in words:
        assert word in str(stop.value)


@pytest.mark.parametrize("name", [
    "transformer.wte.weight", "transformer.ln_f.bias", "transformer.h.1.ln_2.weight",
    "transformer.h.0.attn.c_attn.weight", "transformer.h.2.attn.c_attn.bias",
    "transformer.h.1.attn.c_proj.bias", "transformer.h.0.mlp.c_fc2.weight"])
def test_a_missing_tensor_is_named(name, tmp_path):
    w = published()
    del w[name]
    if name == "transformer.wte.weight":  # the head alone would do
        del w["lm_head.weight"]
    refused(write(tmp_path, w), name)


@pytest.mark.numeric
def test_a_head_is_not_needed(tmp_path):
    w = published()
    del w["lm_head.weight"]
    assert distance(Transformer.from_pretrained(write(tmp_path, w)), w) < 1e-4


@pytest.mark.parametrize("name", ["transformer.wpe.weight", "transformer.h.3.ln_1.weight",
                                  "transformer.h.0.attn.q_attn.bias"])
def test_an_unknown_tensor_is_named(name, tmp_path):
    refused(write(tmp_path, published() | {name: np.ones(C, np.float32)}), name)


@pytest.mark.parametrize("name", [
    "transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.bias",
    "transformer.h.2.mlp.c_proj.weight", "transformer.ln_f.weight", "lm_head.weight"])
def test_a_misshapen_tensor_is_named(name, tmp_path):
    """Transposed, as a folder of nn.Linear would have it, or too short."""
    w = published()
    w[name] = np.ascontiguousarray(w[name].T) if w[name].ndim == 2 else w[name][:-1]
    refused(write(tmp_path, w), name)


def test_a_head_that_is_not_the_embedding_is_refused(tmp_path):
    w = published()
    w["lm_head.weight"][7, 5] += 1e-3
    refused(write(tmp_path, w), "lm_head.weight")


class Trap:
    """What unpickling without care would run: it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_is_not_executed(tmp_path):
    write(tmp_path / "folder", published(), extra={"trap": Trap(tmp_path / "sprung")})
    refused(tmp_path / "folder", "pytorch_model-0000")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"transformer.ln_f.bias": "text"},
                                     {3: torch.ones(2)}, torch.ones(2)],
                         ids=["list", "text", "number", "tensor"])
def test_a_bin_of_other_things_is_refused(content, tmp_path):
    write(tmp_path, published(), "bin")
    torch.save(content, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin")


@pytest.mark.parametrize("layout", ["bins", "safetensors-shards"])
def test_a_cut_shard_is_refused(layout, tmp_path):
    shard = sorted(write(tmp_path, published(), layout).glob("*00002-of*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1000])
    refused(tmp_path, shard.name)


@pytest.mark.parametrize("layout", ["bins", "safetensors-shards"])
def test_an_index_stays_in_its_folder(layout, tmp_path):
    write(tmp_path / "folder", published(), layout)
    index = next((tmp_path / "folder").glob("*.index.json"))
    content = json.loads(index.read_text())
    name, file = next(iter(content["weight_map"].items()))
    os.rename(tmp_path / "folder" / file, tmp_path / file)  # it is there, but elsewhere
    for other in (f"../{file}", str(tmp_path / file), "nowhere.bin"):
        content["weight_map"] |= {n: other for n, f in content["weight_map"].items()
                                  if f == content["weight_map"][name]}
        index.write_text(json.dumps(content))
        refused(tmp_path / "folder", other)


# ---- AdamW ---------------------------------------------------------------------------------------

ETA, BETAS, ADAM_EPS, DECAY, CLIP, STEPS = 0.01, (0.9, 0.95), 1e-9, 0.1, 0.3, 6


def table(name: str) -> tuple[float, float]:
    """The published grouping: parameter -> (multiplier of the rate, weight decay)."""
    if name == "model.embed_tokens.weight":
        return 1.0, DECAY
    return (1 / M, DECAY) if name.endswith("_proj.weight") else (1.0, 0.0)


def wrong(name: str, how: str) -> tuple[float, float]:
    mult, decay = table(name)
    hidden, embedding = name.endswith("_proj.weight"), "embed_tokens" in name
    if how == "multiplier forgotten":
        return 1.0, decay
    if how == "multiplier on biases":
        return (1 / M if name.endswith("_proj.bias") else mult), decay
    if how == "multiplier on the embedding":
        return (1 / M if embedding else mult), decay
    if how == "embedding undecayed":
        return mult, (0.0 if embedding else decay)
    if how == "everything decayed":
        return mult, DECAY
    assert how == "hidden decay times m"
    return mult, (decay * M if hidden else decay)


def start() -> Transformer:
    """CrystalCoder in small, its vectors moved off 0 and 1 so that a decay on them shows.

    In float64: where a gradient is near 0, Adam makes a step of its rounding, which in float32 is
    larger than what is looked for.
    """
    model = Transformer(dataclasses.replace(CONFIG, init_std=0.146, mup_emb_mult=7.3,
                                            mup_alpha=2.22))
    init_weights(model, 1)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.double()


def trained(step, model: Transformer) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Six steps on one stream of tokens -> the losses and the final weights."""
    losses = []
    for t in range(1, STEPS + 1):
        x = ids(4, T + 1, seed=100 + t)
        model.zero_grad()
        loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        step(t)
        losses.append(loss.item())
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, w in weights.items():
        if name.endswith("k_proj.bias"):
            # In the dimensions that do not rotate it adds q b to all scores of a query, which
            # softmax takes out: its gradient is rounding, and Adam scales that up to full steps.
            w.view(H, C // H)[:, R:] = 0
    return losses, weights


def by_torch():
    model = start()
    optimizer = torch.optim.AdamW(
        [dict(params=g["params"], lr=ETA * g["lr_mult"], weight_decay=g["weight_decay"])
         for g in param_groups(model, DECAY)], betas=BETAS, eps=ADAM_EPS)

    def step(t: int) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return trained(step, model)


def by_hand(group):
    """AdamW written out, in float64: group(name) -> (multiplier, decay)."""
    model = start()
    mean = {name: torch.zeros(p.shape, dtype=torch.float64)
            for name, p in model.named_parameters()}
    square = {name: torch.zeros_like(m) for name, m in mean.items()}

    @torch.no_grad()
    def step(t: int) -> None:
        grads = {name: p.grad for name, p in model.named_parameters()}
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        assert norm > CLIP  # so that clipping is part of the test
        for name, p in model.named_parameters():
            g = grads[name] * CLIP / (norm + 1e-6)  # as torch's clipping has it
            mean[name] = BETAS[0] * mean[name] + (1 - BETAS[0]) * g
            square[name] = BETAS[1] * square[name] + (1 - BETAS[1]) * g**2
            m_hat, v_hat = mean[name] / (1 - BETAS[0]**t), square[name] / (1 - BETAS[1]**t)
            mult, decay = group(name)
            p -= ETA * mult * (m_hat / (v_hat.sqrt() + ADAM_EPS) + decay * p)

    return trained(step, model)


def apart(a, b) -> float:
    """The largest difference of two runs, in a loss or a weight."""
    (losses, weights), (other_losses, other_weights) = a, b
    assert weights.keys() == other_weights.keys()
    return max([abs(x - y) for x, y in zip(losses, other_losses, strict=True)]
               + [float((w - other_weights[name]).abs().max()) for name, w in weights.items()])


@pytest.fixture(scope="module")
def run():
    return by_torch()


@pytest.mark.numeric
def test_steps_equal_adamw_by_hand(run):
    assert apart(run, by_hand(table)) < 1e-12


@pytest.mark.numeric
@pytest.mark.parametrize("how", [
    "multiplier forgotten", "multiplier on biases", "multiplier on the embedding",
    "embedding undecayed", "everything decayed", "hidden decay times m"])
def test_steps_see_a_wrong_group(how, run):
    assert apart(run, by_hand(lambda name: wrong(name, how))) > 1e-4


# ---- sizes and initial weights -------------------------------------------------------------------

@pytest.mark.parametrize("stage", [1, 2, 3])
def test_number_of_parameters(stage):
    config = load([str(REPO / f"configs/crystalcoder_7b_stage{stage}.py")])[0].model
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == 6_575_278_720


STD, SMALL = 0.073, ModelConfig(
    n_layer=4, n_head=2, n_embd=256, n_inner=int(8 * 256 / 3), vocab_size=2000, seq_len=128,
    norm="layer", norm_eps=1e-5, bias=True, rotary_dim=32, rope_interleaved=True, tie=True,
    init_std=0.073, mup_base_width=16, mup_emb_mult=14.6, mup_alpha=2.22)  # m = 16


@pytest.mark.numeric
def test_init():
    """Truncated normals by class of tensor: their real std is 0.8796 of the number."""
    small, m, drawn = Transformer(SMALL), 16, 0
    init_weights(small, 1337)
    for name, p in small.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            std = STD if "embed" in name else STD / math.sqrt(m)
            if "o_proj" in name or "down_proj" in name:
                std /= math.sqrt(2 * SMALL.n_layer)
            assert abs(p.std().item() / (0.8796 * std) - 1) < 0.02, name
            assert abs(p.mean().item()) < 0.02 * std, name
            assert 1.98 * std < p.abs().max().item() <= 2 * std * (1 + 1e-6), name
            drawn += 1
    assert drawn == 1 + 7 * SMALL.n_layer


def test_first_loss():
    """28, not ln V = 7.6: the tied head reads the token just read back from the residual.

    Its logit is about 0.88 std C alpha / m: it is the base width that counts, so this is 256.
    """
    config = dataclasses.replace(SMALL, n_head=4, n_embd=512, n_inner=1365, mup_base_width=256)
    model = Transformer(config)
    init_weights(model, 1337)
    x = ids(2, 129, SMALL.vocab_size)
    with torch.no_grad():
        assert 27 < model(x[:, :-1], x[:, 1:]).item() < 29.5
