"""Folders of Hugging Face: config.json and the weights, in the words of each family.

    config = read_config(folder)                        # LLaMA, CrystalCoder, or a mixture of ours
    for name, tensor, where in read_weights(folder, config, shapes): ...
    write_folder(folder, config, shapes, read, tokens, dtype, max_shard_gb)

model.py says what the switches mean and calls these three; this file says how others spell them.
Reads safetensors and pickled .bin, whole or in shards, and never runs what it reads.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nano360.config import CHECKPOINT, ModelConfig, Stop, check_model, fill
from nano360.files import read_sealed, sha256_file

LLAMA_KEYS = {  # config.json -> ours
    "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd",
    "intermediate_size": "n_inner", "vocab_size": "vocab_size",
    "max_position_embeddings": "seq_len", "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta",
}
CRYSTAL_KEYS = {name: name for name in ("n_layer", "n_head", "n_embd", "n_inner", "vocab_size",
                                        "rotary_dim")} | {
    "n_positions": "seq_len", "layer_norm_epsilon": "norm_eps",
    "mup_embeddings_scale": "mup_emb_mult", "mup_output_alpha": "mup_alpha",
}
CRYSTAL_IS = {  # what its config.json must say
    "activation_function": "swiglu", "position_embedding_type": "rotary",
    "scale_attn_weights": True, "mup_scale_qk_dot_by_d": True, "tie_word_embeddings": True,
}
CRYSTAL_NAMES = {  # in transformer.h.{i} -> in model.layers.{i}, joined along the output axis
    "ln_1": ["input_layernorm"], "attn.c_proj": ["self_attn.o_proj"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "ln_2": ["post_attention_layernorm"], "mlp.c_proj": ["mlp.down_proj"],
    "mlp.c_fc": ["mlp.up_proj"], "mlp.c_fc2": ["mlp.gate_proj"],  # c_fc2 is the one with the SiLU
}
# Rotary tables, causal masks and the mask's value: what published files carry beside the weights.
NO_WEIGHT = r"(rotary_emb\.inv_freq|\.attn\.bias|\.attn\.masked_bias)$"


def family(c: ModelConfig) -> str:
    """Whose folders can hold a model of these switches: llama, crystalcoder, or only our own."""
    if (c.norm, c.rope_interleaved, c.rotary_dim, c.mup_base_width, c.mup_emb_mult, c.mup_alpha
            ) == ("rms", False, None, None, 1, 1):
        return "llama"
    crystal = (c.norm == "layer" and c.bias and c.rope_interleaved and c.rotary_dim and c.tie
               and c.mup_base_width and c.n_kv_head in (None, c.n_head) and c.rope_theta == 10000)
    return "crystalcoder" if crystal else "nano360"


def layout(config: ModelConfig, names: Iterable[str]) -> dict[str, tuple[list[str], bool]]:
    """Tensor in a folder -> our parameters joined in it, and whether it is (in, out): both ways."""
    table = {name: ([name], False) for name in names}
    if family(config) == "crystalcoder":  # matrices are Conv1D: y = x W
        table = {"transformer.wte.weight": (["model.embed_tokens.weight"], False)}
        for i in range(config.n_layer):
            table |= {f"transformer.h.{i}.{theirs}.{kind}":
                      ([f"model.layers.{i}.{one}.{kind}" for one in ours],
                       kind == "weight" and not theirs.startswith("ln"))
                      for theirs, ours in CRYSTAL_NAMES.items() for kind in ("weight", "bias")}
        table |= {f"transformer.ln_f.{kind}": ([f"model.norm.{kind}"], False)
                  for kind in ("weight", "bias")}
    if config.tie:
        table["lm_head.weight"] = (["model.embed_tokens.weight"], False)
    return table


def config_json(c: ModelConfig) -> dict:
    """What config.json says of the model, in the words of the family that can hold it."""
    kind = family(c)
    if kind == "nano360":
        return {"model_type": "nano360"} | dataclasses.asdict(c)
    if kind == "crystalcoder":
        return {"architectures": ["CrystalCoderLMHeadModel"], "model_type": "crystalcoder",
                "mup_width_scale": c.mup_base_width / c.n_embd, "initializer_range": c.init_std,
                "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": True,
                } | CRYSTAL_IS | {theirs: getattr(c, ours) for theirs, ours in CRYSTAL_KEYS.items()}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "use_cache": True,
            "tie_word_embeddings": c.tie, "attention_bias": c.bias, "mlp_bias": c.bias,
            "hidden_act": "silu", "num_key_value_heads": c.n_kv_head or c.n_head,
            "initializer_range": c.init_std,
            } | {theirs: getattr(c, ours) for theirs, ours in LLAMA_KEYS.items()}


def llama_config(theirs: dict) -> tuple[dict, dict]:
    """What LLAMA_KEYS lacks, and what is odd about a config.json: words -> whether it is there."""
    rope, scaling = theirs.get("rope_parameters") or {}, theirs.get("rope_scaling") or {}
    # in new files, in old ones, in the oldest
    theta = rope.get("rope_theta") or theirs.get("rope_theta") or 10000.0
    heads, C = theirs.get("num_attention_heads") or 1, theirs.get("hidden_size") or 0
    kv_heads = theirs.get("num_key_value_heads") or heads
    kind = scaling.get("rope_type", scaling.get("type", rope.get("rope_type")))
    bias = theirs.get("attention_bias", False)
    odd = {"rope scaling": kind not in (None, "default"),
           "one of attention_bias and mlp_bias alone": bias != theirs.get("mlp_bias", False),
           f"hidden_act {theirs.get('hidden_act')}": theirs.get("hidden_act", "silu") != "silu",
           "head_dim that is not hidden_size / heads":
               theirs.get("head_dim") not in (None, C // heads)}
    return {"n_kv_head": None if kv_heads == heads else kv_heads, "bias": bias, "rope_theta": theta,
            "tie": theirs.get("tie_word_embeddings", False),
            "init_std": theirs.get("initializer_range", 0.02)}, odd


def crystal_config(theirs: dict) -> tuple[dict, dict]:
    """What CRYSTAL_KEYS lacks, and what is odd about a config.json."""
    scale, C = theirs.get("mup_width_scale"), theirs.get("n_embd") or 0
    base = C * scale if isinstance(scale, float | int) else 0  # a whole number, but for rounding
    fits = base > 0.5 and abs(base - round(base)) < 1e-6
    odd = {f"{key} {theirs.get(key)}": theirs.get(key) != value
           for key, value in CRYSTAL_IS.items()}
    odd[f"mup_width_scale {scale} of n_embd {C}"] = not fits
    odd["scale_attn_by_inverse_layer_idx"] = theirs.get("scale_attn_by_inverse_layer_idx", False)
    return {"norm": "layer", "bias": True, "rope_interleaved": True, "tie": True,
            "mup_base_width": round(base) if fits else None,
            # not in published files, where transformers would assume 0.02; params.yaml has 0.073
            "init_std": theirs.get("initializer_range", 0.073)}, odd


def read_config(folder: Path) -> ModelConfig:
    """config.json of a folder of ours, a LLaMA or a CrystalCoder. Raises Stop(CHECKPOINT)."""
    path = folder / "config.json"
    if not path.is_file():
        raise Stop(CHECKPOINT, f"no checkpoint at {folder}: {path} is missing; expected a folder "
                   "such as out/demo/ckpt_007 or one from Hugging Face")
    try:
        theirs = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise Stop(CHECKPOINT, f"{path} is no json object: {error}") from error
    kind = theirs.get("model_type")
    keys = {"llama": LLAMA_KEYS, "crystalcoder": CRYSTAL_KEYS,
            "nano360": {f.name: f.name for f in dataclasses.fields(ModelConfig)}}
    if not isinstance(kind, str) or kind not in keys:
        raise Stop(CHECKPOINT, f"{path}: model_type {kind!r}; {', '.join(keys)} are read here")
    if missing := [name for name in keys[kind] if name not in theirs and name != "rope_theta"]:
        raise Stop(CHECKPOINT, f"{path}: {', '.join(missing)} is missing")
    given = {ours: theirs[name] for name, ours in keys[kind].items() if name in theirs}
    more, odd = {}, {}
    if kind != "nano360":
        try:
            more, odd = (llama_config if kind == "llama" else crystal_config)(theirs)
        except (TypeError, AttributeError, ValueError, OverflowError) as error:  # "8" for 8
            raise Stop(CHECKPOINT, f"{path}: a value is of the wrong type: {error}") from error
    if found := [name for name, there in odd.items() if there]:
        raise Stop(CHECKPOINT, f"{path}: {', '.join(found)} is not supported in a {kind}")
    try:
        config = fill([ModelConfig], {k: (v, str(path)) for k, v in (given | more).items()})[0]
    except Stop as stop:  # a size that is none
        raise Stop(CHECKPOINT, str(stop)) from stop
    if errors := check_model(config):
        raise Stop(CHECKPOINT, "\n".join(f"{path}: {error}" for error in errors))
    return config


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


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a folder: safetensors, else pickled; one, or an index's."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        single, index = folder / name, folder / f"{name}.index.json"
        if single.is_file():
            return [single]
        if not index.is_file():
            continue
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            names = sorted(set(content["weight_map"].values()), key=str)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Stop(CHECKPOINT, f"{index} is no index of shards: {error!r}") from error
        for name in names:
            if Path(str(name)).name != name or not (folder / name).is_file():
                raise Stop(CHECKPOINT, f"{index} names {name}, which is not a file in {folder}")
        return [folder / name for name in names]
    raise Stop(CHECKPOINT, f"{folder}: no weights; expected model.safetensors or "
               "pytorch_model.bin, or the index of their shards")


def tensors_of(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors of a file, read when touched. Nothing in it is ever executed."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    yield name, tensors.get_tensor(name)
            return
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor)
                                                  for k, v in found.items()):
            raise ValueError("it holds other things than named tensors")
    except Exception as error:  # a foreign file breaks in as many ways as there are readers
        raise Stop(CHECKPOINT, f"{file} is no whole file of weights: {str(error).strip()[:200]}"
                   ) from error
    yield from found.items()


def read_file(file: Path, table: dict[str, tuple[list[str], bool]], shapes: dict[str, torch.Size]
              ) -> Iterator[tuple[str, torch.Tensor, str]]:
    """(our parameter, tensor, what it is there) of one file. Raises Stop(CHECKPOINT)."""
    for name, tensor in tensors_of(file):
        if re.search(NO_WEIGHT, name):
            continue
        ours, turned = table.get(name, ([], False))
        if not ours:
            raise Stop(CHECKPOINT, f"{file}: tensor {name} {tuple(tensor.shape)} is none of the "
                       "model that config.json describes")
        rows = [shapes[one][0] for one in ours]
        needs = (sum(rows), *shapes[ours[0]][1:])
        needs = needs[::-1] if turned else needs
        if tensor.shape != needs or not tensor.is_floating_point():
            raise Stop(CHECKPOINT, f"{file}: tensor {name} is {tuple(tensor.shape)} of "
                       f"{tensor.dtype}, config.json makes it {needs} of floats")
        parts = (tensor.T if turned else tensor).split(rows)
        for one, part in zip(ours, parts, strict=True):
            yield one, part, f"{file}: tensor {name}"


def read_weights(folder: Path, config: ModelConfig, shapes: dict[str, torch.Size]
                 ) -> Iterator[tuple[str, torch.Tensor, str]]:
    """(our parameter, tensor, what it is there) of a folder's files, one tensor after another.

    What is there twice comes twice. Raises Stop(CHECKPOINT), also if one has not come at all.
    """
    table, seen = layout(config, shapes), set()
    for file in weight_files(folder):
        for one in read_file(file, table, shapes):
            seen.add(one[0])
            yield one
    missing = [name for name, (ours, _) in table.items() if not seen >= {*ours}]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise Stop(CHECKPOINT, f"{folder}: tensor {missing[0]}{more} is missing in the files")


def write_folder(folder: Path, config: ModelConfig, shapes: dict[str, torch.Size],
                 read: Callable[[list[str]], dict[str, torch.Tensor]], tokens: dict,
                 dtype: torch.dtype, max_shard_gb: float) -> None:
    """config.json and our parameters in files of at most max_shard_gb, 10^9 bytes each.

    `read` gives some of the parameters by name: those of one file at a time are in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if old := [*folder.glob("*model*.safetensors*"), *folder.glob("pytorch_model*")]:
        raise Stop(CHECKPOINT, f"{old[0]} is there already: save to a new folder")
    content = config_json(config) | tokens | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = layout(config, shapes)
    if config.tie and family(config) != "crystalcoder":
        del table["lm_head.weight"]  # transformers makes it from the embedding
    sizes = {name: sum(shapes[one].numel() for one in parts) * dtype.itemsize
             for name, (parts, _) in table.items()}
    shards, room = [[]], 0.0
    for name, size in sizes.items():
        if shards[-1] and room + size > max_shard_gb * 1e9:  # a larger one has a file of its own
            shards, room = [*shards, []], 0.0
        shards[-1].append(name)
        room += size
    where = {}
    for n, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else (
            f"model-{n:05d}-of-{len(shards):05d}.safetensors")
        where |= dict.fromkeys(names, file)
        ours, tensors = read([one for name in names for one in table[name][0]]), {}
        for name in names:
            parts, turned = table[name]
            again = name == "lm_head.weight" and config.tie  # it is the embedding once more
            whole = [(ours[one] if "embed" in one else ours.pop(one)).detach().to("cpu", dtype)
                     for one in parts]
            # a copy where names would share memory, which safetensors refuses
            whole = torch.cat(whole) if len(whole) > 1 or again else whole[0]
            tensors[name] = (whole.T if turned else whole).contiguous()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=1) + "\n", encoding="utf-8")


def checkpoint_hash(folder: str | Path) -> str:
    """What a score belongs to: one sha256 over config.json and the weights of a folder."""
    files, state = [Path(folder) / "config.json", *weight_files(Path(folder))], {"files": {}}
    if (Path(folder) / "state.json").exists():  # has them, and verify() compares them when read
        state = read_sealed(Path(folder) / "state.json", CHECKPOINT)
    lines = "".join(f"{state['files'].get(path.name) or sha256_file(path)}  {path.name}\n"
                    for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()
