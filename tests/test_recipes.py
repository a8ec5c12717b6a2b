"""configs/: the recipes say what was published about Amber and CrystalCoder, number by number.

What is compared with was read in the released code, cards and listings, not in the configs.
"""

from fnmatch import fnmatchcase

import pytest
import torch

from conftest import REPO
from model import Transformer
from nano360.config import Config, load

RECIPES = {p.stem: p for p in sorted((REPO / "configs").glob("[!_]*.py"))}
STAGES = ["crystalcoder_7b_stage1", "crystalcoder_7b_stage2", "crystalcoder_7b_stage3"]
SLIM = ["arxiv", "book", "c4", "commoncrawl", "github", "stackexchange", "wikipedia"]
LLAMA = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
AMBER = [f"train/train_{k:03d}.jsonl" for k in range(360)]
STARCODER = ["c/train-00010-of-00053.parquet", "css/train-00000-of-00003.parquet",
             "java/train-00011-of-00087.parquet", "javascript/train-00020-of-00065.parquet",
             "jupyter-scripts-dedup-filtered/train-00001-of-00007.parquet",
             "python/train-00000-of-00059.parquet", "python/train-00058-of-00059.parquet"]

# pretrain/params/phase{1,2,3}/params.yaml, to seven digits
WEIGHTS = [
    dict(zip(SLIM, (.0432512, .0413122, .2665010, .5334582, .0496259, .0316803, .0341712),
             strict=True)),
    dict(zip([*SLIM, "starcoder"], (.0160839, .0153586, .0990998, .1983898, .0184546, .0117849,
                                    .0127109, .6281176), strict=True)),
    dict(css=.0879278, javascript=.1837076, html=.1853675, python=.3427009, arxiv=.0166633,
         book=.0083144, c4=.0168569, commoncrawl=.0582829, stackexchange=.0083798,
         wikipedia=.0583585, starcoder=.0334404),
]


def recipe(name: str) -> Config:
    return load([str(RECIPES[name])])[0]


def parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config.model).parameters())


def taken(names: list[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatchcase(name, pattern)]


@pytest.mark.parametrize("name", RECIPES)
def test_every_source_says_where_it_is_and_under_which_licence(name):
    data = recipe(name).data
    assert data.sources
    for source in data.sources:
        assert source.path.startswith(("hf:datasets/", "list:https://", "https://", "stdlib:"))
        assert source.licence not in ("", "unknown")
    if not all(source.path.startswith("stdlib:") for source in data.sources):  # which train one
        assert data.tokenizer.startswith("hf:") and data.tokenizer_sha256 == LLAMA


# ---- Amber ---------------------------------------------------------------------------------------

def test_amber_trains_the_released_chunks():
    config = recipe("amber_7b")
    data, optim, (source,) = config.data, config.optim, config.data.sources
    assert source.rows and taken(AMBER, source.files) == AMBER and data.n_chunks == len(AMBER)
    assert data.rows_per_chunk == 762 * 2240 and optim.batch_size == 2240
    assert optim.decay_steps == 762 * 360 == 274_320
    assert 274_320 * 2240 * 2048 == 1_258_448_486_400  # targets
    held = 7 * data.valid_rows  # of seven sources, out of what fills no batch
    assert 0 < held == 91 <= 1_706_976 - data.rows_per_chunk == 96
    assert not data.bos and not data.overlap and not data.keep_downloads
    assert parameters(config) == 6_738_415_616


@pytest.mark.numeric
def test_amber_from_its_sources_has_the_shares_of_the_card():
    data, released = recipe("amber_7b_raw").data, recipe("amber_7b")
    assert data.n_chunks * data.rows_per_chunk * 2049 == 1_259_133_776_640
    tokens = dict(arxiv=30.00, book=28.86, c4=197.67, refinedweb=665.01, stackexchange=21.75,
                  starcoderdata=291.92, wikipedia=23.90)
    assert {s.name: s.weight for s in data.sources} == tokens
    rows = dict(arxiv=40_670, book=39_125, c4=267_976, refinedweb=901_537, stackexchange=29_486,
                starcoderdata=395_749, wikipedia=32_401)
    for name, count in rows.items():
        share = tokens[name] / sum(tokens.values())
        assert abs(data.rows_per_chunk * share - count) < 5 + 1e-4 * count
    assert {s.name for s in data.sources if s.text_key} == {"refinedweb", "starcoderdata"}
    assert recipe("amber_7b_raw").optim == released.optim
    # Of the source with the most, less is held out than Amber held out.
    assert data.valid_share * 665.01e9 < 102_400 * 2049
    assert not data.bos and not data.overlap


@pytest.mark.numeric
def test_amber_100m_is_two_chunks_on_one_gpu():
    config = recipe("amber_100m")
    m, data, optim = config.model, config.data, config.optim
    assert parameters(config) == 134_105_856
    assert (m.n_embd // m.n_head, m.n_inner * 3) == (64, m.n_embd * 8)
    assert abs(m.init_std - 0.02 * (4096 / m.n_embd) ** 0.5) < 5e-4
    assert taken(AMBER, data.sources[0].files) == AMBER[:data.n_chunks] == AMBER[:2]
    assert data.rows_per_chunk % optim.batch_size == 0
    assert optim.batch_size % optim.micro_batch_size == 0
    assert data.n_chunks * data.rows_per_chunk // optim.batch_size == 14_224
    assert optim.decay_steps is None and round(optim.lr / optim.min_lr, 9) == 10
    tokens = data.n_chunks * data.rows_per_chunk * m.seq_len
    assert round(tokens / 1e9, 2) == 6.99
    assert round(6 * parameters(config) * tokens / (0.4 * 989e12) / 3600, 1) == 4.0  # hours
    assert round(optim.warmup_steps * optim.batch_size * m.seq_len / 1e6) == 375


# ---- CrystalCoder --------------------------------------------------------------------------------

@pytest.mark.numeric
@pytest.mark.parametrize("stage", range(3))
def test_a_stage_has_the_published_mix(stage):
    sources = recipe(STAGES[stage]).data.sources
    assert abs(sum(s.weight for s in sources) - 1) < 1e-6
    assert {s.name: round(s.weight, 7) for s in sources} == WEIGHTS[stage]


@pytest.mark.parametrize("stage, steps, billions, every", [
    (0, 79_721, 344.823, 1500), (1, 214_387, 927.304, 1500), (2, 27_728, 119.934, 1000)])
def test_a_stage_has_the_published_length(stage, steps, billions, every):
    config = recipe(STAGES[stage])
    data, optim = config.data, config.optim
    assert (optim.max_steps, optim.batch_size, config.model.seq_len) == (steps, 2112, 2048)
    assert round(steps * 2112 * 2048 / 1e9, 3) == billions
    assert data.rows_per_chunk == every * 2112  # a checkpoint after each chunk
    assert (data.n_chunks - 1) * every < steps <= data.n_chunks * every
    assert parameters(config) == 6_575_278_720


def test_two_stages_lie_on_one_line():
    first, second = recipe(STAGES[0]).optim, recipe(STAGES[1]).optim
    at = (79_721 + 214_387 - 86) / 294_337
    assert round(first.lr + (first.min_lr - first.lr) * at, 8) == second.min_lr == 0.00013679


def test_what_a_stage_reads():
    one, two, three = ({s.name: s for s in recipe(name).data.sources} for name in STAGES)
    parts = dict(arxiv="ArXiv", book="Book", c4="C4", commoncrawl="CommonCrawl", github="Github",
                 stackexchange="StackExchange", wikipedia="Wikipedia")
    for sources, subset in ((one, "even"), (two, "odd"), (three, "tenth")):
        for name in parts.keys() & sources.keys():
            source = sources[name]
            assert "cerebras/SlimPajama-627B" in source.path and source.subset == subset
            assert source.where == f"meta.redpajama_set_name=RedPajama{parts[name]}"
            assert source.files == "train/*.jsonl.zst" and not source.fim_rate
    assert "github" not in three
    code = [two["starcoder"], three["starcoder"], *(three[n] for n in WEIGHTS[2] if n in (
        "css", "javascript", "html", "python"))]
    assert [(s.fim_rate, s.epochs) for s in code] == [(0.9, 3), (0.9, 1), *[(0.3, 3)] * 4]
    assert all((s.path, s.text_key, s.subset) == (
        "hf:datasets/bigcode/starcoderdata", "content", "all") for s in code)
    assert taken(STARCODER, two["starcoder"].files) == STARCODER
    assert taken(STARCODER, three["starcoder"].files) == [STARCODER[i] for i in (0, 1, 3, 5)]
    assert taken(STARCODER, three["python"].files) == STARCODER[5:]
    assert taken(STARCODER, three["javascript"].files) == STARCODER[3:4]


@pytest.mark.parametrize("name", STAGES)
def test_crystal_rows_and_tokens(name):
    config = recipe(name)
    data, specials = config.data, config.data.special_tokens.split(" ")
    assert data.bos and data.overlap and data.keep_downloads
    ids = {token: 32000 + i for i, token in enumerate(specials)}
    assert len(ids) == len(specials) == 22
    assert all(token.startswith("<|") and token.endswith("|>") for token in specials)
    named = {"<|fim_prefix|>": 32000, "<|fim_middle|>": 32001, "<|fim_suffix|>": 32002,
             "<|fim_pad|>": 32003, "<|filename|>": 32004, "<|reponame|>": 32017,
             "<|im_start|>": 32018, "<|sys_end|>": 32021}
    assert named.items() <= ids.items()
    assert max(ids.values()) + 1 + 10 == config.model.vocab_size == 32032  # ten are unused
