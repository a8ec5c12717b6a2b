"""model.py against transformers, and its promises about weights, text and folders."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import REPO
from model import Transformer, align, class_of, flops_per_token, init_weights, param_groups, pick
from nano360.config import CHECKPOINT, ModelConfig, Stop, load
from nano360.hf_folders import read_config

TINY = ModelConfig(n_layer=2, n_head=4, n_embd=64, n_inner=172, vocab_size=320, seq_len=48,
                   norm_eps=3e-5, rope_theta=500.0, init_std=0.15)
GROUPED = ModelConfig(n_layer=2, n_head=6, n_kv_head=2, n_embd=48, n_inner=100, vocab_size=320,
                      seq_len=48, init_std=0.15)


def made(config: ModelConfig, seed: int = 1) -> Transformer:
    """A model whose every weight is away from its default, norms included."""
    model = Transformer(config)
    init_weights(model, seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
            if class_of(name) in ("norm", "bias"):
                p.copy_((class_of(name) == "norm") + noise)
    return model


def theirs(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def ids(B: int, T: int, V: int = 320) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(3))


def rewritten(folder, to, how: str):
    """The folder in another file format, as other programs write it."""
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    if how == "bin":
        torch.save(tensors, to / "pytorch_model.bin")
    elif how == "shards of bin":  # as LLM360 published Amber, rotary tables and all
        tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8)
                    for i in range(2)}
        names, where = sorted(tensors), {}
        for n in range(3):
            file = f"pytorch_model-{n + 1:05d}-of-00003.bin"
            torch.save({name: tensors[name] for name in names[n::3]}, to / file)
            where |= dict.fromkeys(names[n::3], file)
        (to / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    else:  # ours
        model = Transformer.from_pretrained(folder)
        (to / "config.json").unlink()
        model.save_pretrained(to, bos=1, max_shard_gb=1e-4 if how == "shards" else 5)
    return to


def like(**changes) -> ModelConfig:
    return ModelConfig(**{**vars(TINY), "seq_len": 96, **changes})


@pytest.mark.numeric
@pytest.mark.parametrize("config, how", [
    (like(), "ours"), (like(), "shards"), (like(), "bin"), (like(), "shards of bin"),
    (like(n_kv_head=2), "ours"), (like(tie=True), "shards"), (like(bias=True), "ours"),
], ids=["plain", "shards", "bin", "shards of bin", "grouped", "tied", "biased"])
def test_equals_transformers(config, how, tmp_path):
    """Logits, loss, every gradient and 64 greedy tokens of LlamaForCausalLM on the same weights.

    They see the folder that we saved, we the same weights in each file format.
    """
    made(config).save_pretrained(tmp_path / "saved", bos=1, eos=None)
    hf = theirs(tmp_path / "saved")
    ours = Transformer.from_pretrained(rewritten(tmp_path / "saved", tmp_path / "again", how))
    assert ours.config == config
    x = ids(3, 40)
    logits = ours(x)
    assert logits.std() > 0.5  # not a model of zeros
    assert (logits - hf(x).logits).abs().max() < 1e-4
    loss, labels = ours(x[:, :-1], x[:, 1:]), x.clone()
    reference = hf(x, labels=labels).loss
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    loss.backward()
    reference.backward()
    grads = dict(hf.named_parameters())
    for name, p in ours.named_parameters():
        norm = grads[name].grad.norm()
        assert p.grad.norm().item() == pytest.approx(norm.item(), rel=1e-5), name
        assert (p.grad - grads[name].grad).norm() <= 1e-4 * norm, name
    prompt = ids(1, 8)
    greedy = hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64,
                         do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.generate(prompt, 64, temperature=0).tolist() == greedy.tolist()
    if how == "shards":  # and they read our shards
        again = theirs(tmp_path / "again")
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), hf.parameters(),
                                                     strict=True))
        assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 2


def test_cache_equals_no_cache():
    """Greedy text with the cache is that of whole forward passes, token for token."""
    model, x = made(GROUPED), ids(3, 5)
    cached, plain = model.generate(x, 40, temperature=0), x
    with torch.no_grad():
        for _ in range(40):
            plain = torch.cat((plain, model(plain)[:, -1].argmax(-1, keepdim=True)), 1)
    assert cached.tolist() == plain.tolist()


CRYSTAL = like(norm="layer", bias=True, rotary_dim=8, rope_interleaved=True, tie=True,
               mup_base_width=16, mup_emb_mult=3.0, mup_alpha=1.5, seq_len=48)


@pytest.mark.parametrize("config", [GROUPED, CRYSTAL], ids=["llama", "crystal"])
def test_prompts_of_different_lengths(config):
    """Each row is continued as it would be alone, also where the context fills up."""
    model = made(config)
    prompts = [ids(1, n)[0].tolist() for n in (3, 17, 9)]
    idx, lengths = align(prompts)
    assert idx.shape == (3, 17) and lengths.tolist() == [3, 17, 9]
    out = model.generate(idx, 31, temperature=0, lengths=lengths)  # 17 + 31 fill the context
    for row, prompt in zip(out, prompts, strict=True):
        alone = model.generate(torch.tensor([prompt]), 31, temperature=0)[0]
        assert row[17 - len(prompt):].tolist() == alone.tolist()
    slid = model.generate(idx, 40, temperature=0, lengths=lengths)
    assert slid[:, :48].tolist() == out.tolist() and slid.shape == (3, 57)
    with torch.no_grad():  # beyond it, from the last 24 tokens of each row
        again = model(slid[:, 48 + 1 - 24:48 + 1])[:, -1].argmax(-1)
    assert again.tolist() == slid[:, 49].tolist()
    assert align([[1, 2], [3, 4]])[1] is None  # equal lengths need no mask


@pytest.mark.numeric
def test_a_chunk_on_a_cache():
    """The second half of a text on the cache of the first gives the logits of the whole."""
    model, x = made(GROUPED), ids(2, 30)
    with torch.no_grad():
        cache = model.new_cache(2, torch.float32)
        first, second = model(x[:, :13], cache=cache), model(x[:, 13:], cache=cache, start=13)
        assert (torch.cat((first, second), 1) - model(x)).abs().max() < 1e-5


def test_one_new_token_needs_no_mask_and_no_concatenation(monkeypatch):
    """What is promised of the fast path: SDPA gets no mask, the cache's tensors stay in place."""
    model, seen = made(GROUPED), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, is_causal=False, **rest):
        seen.append((q.size(2), attn_mask is None, is_causal, k.storage_offset(), k.stride(2)))
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model.generate(ids(2, 5), 4, temperature=0)
    assert [s[:3] for s in seen[::2]] == [(5, True, True)] + [(1, True, False)] * 3
    # a view into (B, H, seq_len, D): one token is D apart, and it starts where the cache starts
    assert {s[3:] for s in seen} == {(0, 8)}


def test_generate_beyond_the_context():
    """A full context goes on from its last half; the first tokens are as without the limit."""
    model = made(TINY)
    out = model.generate(ids(1, 40), 30, temperature=0)
    assert out.shape == (1, 70)
    # position 48 was full: the 49th token follows from the 24 before it
    with torch.no_grad():
        again = model(out[:, 48 + 1 - 24:48 + 1])[:, -1].argmax(-1)
    assert again.item() == out[0, 49].item()


def test_generate_stops_at_eos():
    model, x = made(TINY), ids(4, 6)
    free = model.generate(x, 30, temperature=0)
    eos = free[0, 12].item()  # what row 0 says there, some other row may say it elsewhere
    out = model.generate(x, 30, temperature=0, stop=(eos,))
    for row, full in zip(out[:, 6:].tolist(), free[:, 6:].tolist(), strict=True):
        end = full.index(eos) + 1 if eos in full else len(full)
        assert row[:end] == full[:end][:len(row)]
        assert all(i == eos for i in row[end:])
    assert model.generate(x[:1], 30, temperature=0, stop=(eos,)).shape[1] == 6 + free[
        0, 6:].tolist().index(eos) + 1


@pytest.mark.numeric
def test_pick_draws_from_the_right_tokens():
    """Frequencies of many draws equal the renormalized softmax of the top k and the top p."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]])
    many, generator = logits.expand(20000, 5), torch.Generator().manual_seed(0)

    def shares(temperature, top_k, top_p):
        drawn = pick(many, temperature, top_k, top_p, generator)
        return torch.bincount(drawn, minlength=5) / len(drawn)

    p = (logits[0] / 0.7).softmax(-1)
    assert (shares(0.7, 0, 1.0) - p).abs().max() < 0.02
    top2 = torch.where(p >= p[1], p, 0) / (p[0] + p[1])
    assert (shares(0.7, 2, 1.0) - top2).abs().max() < 0.02
    # top_p: the fewest likeliest tokens that hold the share; 2, 1 and 0.5 are needed for 0.9
    assert (p[0] + p[1]) < 0.9 <= p[0] + p[1] + p[4]
    kept = torch.tensor([p[0], p[1], 0, 0, p[4]]) / (p[0] + p[1] + p[4])
    assert (shares(0.7, 0, 0.9) - kept).abs().max() < 0.02
    assert shares(1.0, 0, 1e-9)[0] == 1 and shares(0, 0, 1.0)[0] == 1  # at least the best one


@pytest.mark.numeric
def test_weights_follow_from_seed_and_name():
    """The same tensor in a model with more layers, another seed gives another; std as asked."""
    small, deep = Transformer(TINY), Transformer(ModelConfig(**{**vars(TINY), "n_layer": 5}))
    init_weights(small, 7)
    init_weights(deep, 7)
    others = dict(deep.named_parameters())
    for name, p in small.named_parameters():
        assert torch.equal(p, others[name]), name
        if class_of(name) == "norm":
            assert (p == 1).all()
        else:
            assert p.std().item() == pytest.approx(TINY.init_std, rel=0.05), name
    assert not torch.equal(others["model.layers.0.self_attn.q_proj.weight"],
                           others["model.layers.1.self_attn.q_proj.weight"])
    before = small.lm_head.weight.clone()
    init_weights(small, 8)
    assert not torch.equal(before, small.lm_head.weight)


@pytest.mark.numeric
def test_amber_counts():
    """Published: 6,738,415,616 parameters. 42.86 GFLOP a token by 6 N + 12 L C T."""
    config = load([str(REPO / "configs/amber_7b.py")])[0].model
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    assert flops_per_token(config) == pytest.approx(42.86e9, rel=1e-3)


@pytest.mark.numeric
def test_bfloat16_reads_writes_and_speaks(tmp_path):
    """A cast is an explicit export; a model of bfloat16 gives logits of bfloat16, close to fp32."""
    model, x = made(TINY), ids(2, 30)
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    half = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.cos.dtype == torch.float32  # positions above 256 are no bfloat16 numbers
    again = Transformer.from_pretrained(tmp_path)
    with torch.no_grad():
        assert half(x).dtype == torch.bfloat16 and half(x, x).dtype == torch.float32
        gap = (half(x).float() - again(x)).abs()
        assert 0 < gap.mean() < 0.03 * again(x).std()
    assert half.generate(x, 3).shape == (2, 33)


@pytest.mark.numeric
def test_tables_and_positions_of_bfloat16():
    """The tables are those of fp64 angles to 1e-4 at the end of Amber's context."""
    from model import rope_tables
    cos, _ = rope_tables(like(seq_len=2048, rope_theta=10000.0), "cpu")
    exact = np.cos(np.outer(np.arange(2048), 10000.0 ** (-np.arange(8) / 8)))
    assert cos.dtype == torch.float32
    assert np.abs(cos[:, :8].numpy() - exact).max() < 2e-4


@pytest.mark.numeric
def test_loss_needs_no_logits_of_all_tokens(monkeypatch):
    """In pieces as in one, gradients too; the head never sees more rows than LOSS_LOGITS / V."""
    import model as file
    net, x, y, rows = made(TINY), ids(4, 40), ids(4, 40).flip(1), []
    whole = torch.nn.functional.cross_entropy(net(x).flatten(0, 1), y.flatten())
    whole.backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    monkeypatch.setattr(file, "LOSS_LOGITS", 320 * 7)
    nats = file.token_nats
    monkeypatch.setattr(file, "token_nats", lambda a, h, b: (rows.append(len(a)), nats(a, h, b))[1])
    loss = net(x, y)
    loss.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6) and max(rows) == 7
    for p, g in zip(net.parameters(), grads, strict=True):
        assert (p.grad - g).norm() <= 1e-5 * g.norm()


def test_param_groups_cover_every_parameter():
    model = Transformer(TINY)
    groups = param_groups(model, weight_decay=0.1)
    params = [p for group in groups for p in group["params"]]
    assert len(params) == len(set(map(id, params))) == len(list(model.parameters()))
    assert {group["weight_decay"] for group in groups} == {0.1}  # Amber decays everything
    model.register_parameter("stray", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises((AssertionError, ValueError)):
        param_groups(model, 0.1)


@pytest.mark.numeric
def test_loss_ignores_masked_targets_and_is_fp32():
    model, x = made(TINY), ids(2, 20)
    y = ids(2, 20).clone()
    y[:, :5] = -100
    logp = model(x).log_softmax(-1)
    by_hand = -logp[:, 5:].gather(-1, y[:, 5:, None]).mean()
    assert model(x, y).item() == pytest.approx(by_hand.item(), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        assert model(x, y).dtype == torch.float32


@pytest.mark.numeric
def test_rotary_by_complex_numbers():
    """rotate() is the multiplication of (x_i, x_{i + D/2}) with e^{i p theta^(-2i/D)}."""
    from model import rope_tables, rotate
    cos, sin = rope_tables(TINY, "cpu")
    D, T = 16, TINY.seq_len
    x = torch.randn(1, 1, T, D, generator=torch.Generator().manual_seed(0)).double()
    pairs = torch.complex(x[..., :D // 2], x[..., D // 2:])
    angle = np.outer(np.arange(T), TINY.rope_theta ** (-2 * np.arange(D // 2) / D))
    turned = pairs * torch.polar(torch.ones(T, D // 2).double(), torch.from_numpy(angle))
    expected = torch.cat((turned.real, turned.imag), -1)
    assert (rotate(x.float(), cos, sin, False) - expected).abs().max() < 1e-4


# ---- folders -------------------------------------------------------------------------------------

def test_folder_round_trip(tmp_path):
    model = made(GROUPED)
    model.save_pretrained(tmp_path, eos=2)
    again = Transformer.from_pretrained(tmp_path)
    for (a, p), (b, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert a == b and torch.equal(p, q)
    assert again.config == model.config
    assert torch.equal(model.cos, again.cos)


@pytest.mark.numeric
def test_reads_what_transformers_writes(tmp_path):
    """Sharded safetensors in bfloat16 from save_pretrained of transformers."""
    made(TINY).save_pretrained(tmp_path / "one")
    hf = theirs(tmp_path / "one").to(torch.bfloat16)
    hf.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    model, x = Transformer.from_pretrained(tmp_path / "shards"), ids(2, 30)
    assert next(model.parameters()).dtype == torch.float32
    assert (model(x) - theirs(tmp_path / "shards")(x).logits).abs().max() < 1e-4


def test_memory_of_reading_is_the_model_and_one_shard(tmp_path):
    """A folder of many files is read by a process that grows by little more than the model."""
    config = like(n_layer=8, n_embd=512, n_inner=1400, vocab_size=4000, n_head=8)
    net = Transformer(config)
    size = sum(p.numel() for p in net.parameters()) * 4
    net.save_pretrained(tmp_path / "large", max_shard_gb=size / 12 / 1e9)
    made(TINY).save_pretrained(tmp_path / "small")  # so that all code is there before it counts
    files = [p.stat().st_size for p in (tmp_path / "large").glob("*.safetensors")]
    assert len(files) > 8
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc, which tells the peak of this process alone")
    script = """import re, sys; sys.path.insert(0, sys.argv[1])
from model import Transformer
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
Transformer.from_pretrained(sys.argv[2] + "/small")
before = peak()
Transformer.from_pretrained(sys.argv[2] + "/large")
print(peak() - before)"""
    done = subprocess.run([sys.executable, "-c", script, str(REPO), str(tmp_path)],
                          capture_output=True, text=True, check=True)
    grown = int(done.stdout)
    assert 0.9 * size < grown < size + max(files) + 4e6, (grown, size, max(files))


def test_a_mixture_is_ours_alone(tmp_path):
    """Switches of both families: model_type nano360, read back as it was."""
    config = like(norm="layer", rotary_dim=8, mup_emb_mult=2.0)
    model = made(config)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nano360"
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == config and torch.equal(again(ids(1, 9)), model(ids(1, 9)))


def test_never_over_weights_that_are_there(tmp_path):
    """A folder with the shards of one save and the file of another would be read wrong."""
    made(TINY).save_pretrained(tmp_path)
    with pytest.raises(Stop) as stop:
        made(TINY).save_pretrained(tmp_path, max_shard_gb=1e-4)
    assert "is there already" in str(stop.value)


def test_old_and_new_spelling_of_rope(tmp_path):
    made(TINY).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_theta"]
    path.write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 500.0,
                                                             "rope_type": "default"}}))
    assert read_config(tmp_path).rope_theta == 500.0
    path.write_text(json.dumps(config))  # very old folders have neither
    assert read_config(tmp_path).rope_theta == 10000.0


@pytest.mark.parametrize("change, said", [
    ({"model_type": "gpt2"}, "gpt2"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"hidden_size": "64"}, "wrong type"),
    ({"rope_scaling": "linear"}, "wrong type"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope scaling"),
    ({"tie_word_embeddings": True}, "the two differ"),
    ({"attention_bias": True}, "attention_bias"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"head_dim": 8}, "head_dim"),
    ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight"),
    ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight"),
    ({"vocab_size": 321}, "(320, 64)"),
])
def test_refuses_what_it_does_not_have(change, said, tmp_path):
    made(TINY).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(Stop) as stop:
        Transformer.from_pretrained(tmp_path)
    assert stop.value.code == CHECKPOINT and said in str(stop.value)


def test_refuses_broken_folders(tmp_path):
    def refused(folder) -> str:
        with pytest.raises(Stop) as stop:
            Transformer.from_pretrained(folder)
        assert stop.value.code == CHECKPOINT
        return str(stop.value)

    assert "config.json is missing" in refused(tmp_path / "nowhere")
    made(TINY).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, weights)
    assert "lm_head.weight is missing" in refused(tmp_path)
    save_file(tensors | {"extra.weight": torch.zeros(1)}, weights)
    assert "extra.weight" in refused(tmp_path)
    save_file(tensors, weights)
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refused(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(tmp_path)  # no pickle, whatever its name says
    (tmp_path / "pytorch_model.bin").unlink()
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not a file in" in refused(tmp_path)
    assert math.isfinite(sum(t.sum() for t in tensors.values()))
