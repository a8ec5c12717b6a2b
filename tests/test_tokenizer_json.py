"""Other people's tokenizer.json: its ids and text are those of the library that made it, text stays
text, and what is wrong with the file is said in one line.
"""

import base64
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import prepare
import sample
from conftest import REPO
from model import Transformer, init_weights
from nano360 import tokenizer_json, tokenizers as ours
from nano360.config import DATA, ENVIRONMENT, SECTIONS, ModelConfig, Stop, run
from nano360.tokenizer_json import JsonTokenizer, name_of, tokenizer_files
from nano360.tokenizers import Tokenizer, load_tokenizer

tokenizers = pytest.importorskip("tokenizers")

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))
STORY = "the cat sat on the mat, and the dog sat on a log: café, 中文, 19.\n    def main():\n" * 60
WORDS = [*"at 19.\n\t\0é中🎉\ufffd\ufeff", "  ", "    ", "</s>", "<s>", "<unk>", "<0x0A>",
         "<|end|>", "<|endoftext|>", "ing", " the", " sat"]
# U+2581 is left out: it is the mark of a blank, and comes back as one.
ANY = st.lists(st.sampled_from(WORDS), max_size=40).map("".join) | st.text(
    st.characters(codec="utf-8", exclude_characters="▁"), max_size=30)
LLAMA_BOS = tokenizers.processors.TemplateProcessing(
    single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])


def marked() -> Tokenizer:
    """A sentencepiece BPE as LLaMA's."""
    return Tokenizer("sentencepiece", prepare.train_tokenizer(iter([STORY]), 320), {})


def byte_level() -> "tokenizers.Tokenizer":
    """A byte-level BPE that the library itself trained, with GPT-2's pattern."""
    coder = tokenizers.Tokenizer(tokenizers.models.BPE())
    coder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = tokenizers.decoders.ByteLevel()
    coder.train_from_iterator([STORY], tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>", "<|end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return coder


def changed(data: bytes, **keys) -> bytes:
    """A tokenizer.json with other values at its top."""
    return json.dumps(json.loads(data) | keys).encode()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """A tokenizer.json of either spelling, and others derived from them."""
    llama, gpt = tokenizer_files(marked())["tokenizer.json"], byte_level().to_str().encode()
    with_bos = tokenizers.Tokenizer.from_str(llama.decode())
    with_bos.post_processor = LLAMA_BOS
    metaspace = dict(type="Metaspace", replacement="▁", prepend_scheme="first", split=False)
    return {"marked": llama, "bytes": gpt, "bos": with_bos.to_str().encode(),
            "metaspace": changed(llama, normalizer=None, pre_tokenizer=metaspace)}


def folder_of(path: Path, data: bytes, config: dict | None = None) -> Path:
    """A folder with a tokenizer.json and perhaps a tokenizer_config.json."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_bytes(data)
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


# ---- ids and text --------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["marked", "bytes", "bos", "metaspace"])
def test_ids_and_text_are_hugging_faces(kind, files, tmp_path):
    transformers = pytest.importorskip("transformers")
    eos = "<|endoftext|>" if kind == "bytes" else "</s>"
    folder = folder_of(tmp_path, files[kind], dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token=eos, split_special_tokens=True,
        bos_token=None if kind == "bytes" else "<s>", clean_up_tokenization_spaces=False))
    hugging, tokenizer = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert (tokenizer.bos, tokenizer.eos) == (hugging.bos_token_id, hugging.eos_token_id)
    assert tokenizer.vocab_size == len(hugging) and tokenizer.add_bos == (kind == "bos")

    @EXAMPLES
    @given(ANY)
    def check(text):
        ids = tokenizer.encode(text)
        assert ids == hugging.encode(text, add_special_tokens=False)
        assert [tokenizer.bos] * tokenizer.add_bos + ids == hugging.encode(text)
        lost = kind == "metaspace" and text.startswith(" ")  # a blank that gets no mark in front
        assert tokenizer.decode(ids) == hugging.decode(ids) == text[lost:]
        assert not set(ids) & set(tokenizer.special_tokens.values())
        sizes = tokenizer.piece_bytes()[ids]
        assert sizes.sum() == len(text.encode()) + (kind != "bytes" and text != "" and not lost)
    check()


def test_a_sentencepiece_model_and_its_json_are_the_same(files):
    ours, json_kind = marked(), JsonTokenizer(files["marked"], {})
    assert json_kind.vocab_size == ours.vocab_size
    assert (json_kind.bos, json_kind.eos) == (ours.bos, ours.eos)
    assert json_kind.special_tokens == ours.special_tokens
    assert np.array_equal(json_kind.piece_bytes(), ours.piece_bytes())
    assert json_kind.piece_bytes().dtype == ours.piece_bytes().dtype

    @EXAMPLES
    @given(ANY)
    def check(text):
        ids = ours.encode(text)
        assert json_kind.encode(text) == ids and json_kind.decode(np.array(ids)) == text
        for first in (False, True):
            assert json_kind.encode_piece(text, first) == ours.encode_piece(text, first)
        assert json_kind.decode([1, *ids, 2]) == ours.decode([1, *ids, 2])  # the ends vanish
    check()


@pytest.mark.parametrize("kind", ["marked", "bytes", "metaspace"])
def test_a_text_in_pieces_has_the_ids_of_the_whole(kind, files, monkeypatch):
    monkeypatch.setattr(ours, "BLOCK", 60)
    tokenizer, text = JsonTokenizer(files[kind], {}), STORY.replace(", ", ",  ")[:2000]
    cut = list(ours.blocks([text], 30))
    ids = [i for n, part in enumerate(cut) for i in tokenizer.encode_piece(part, n == 0)]
    assert len(cut) > 40 and ids == tokenizer.encode(text) and tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["marked", "bytes"])
def test_half_a_character_is_one_mark_and_spoils_no_other(kind, files):
    """As tiktoken; the library's own decoder loses whole characters beside a broken one."""
    tokenizer = JsonTokenizer(files[kind], {})
    ids, cut = tokenizer.encode("🎉🎉"), tokenizer.encode("🎉")[-4:]
    assert tokenizer.decode([*ids, cut[0]]) == "🎉🎉\ufffd"
    broken = tokenizer.decode([*ids[:-1], *tokenizer.encode("a")])
    assert broken.replace(" ", "") == "🎉\ufffda"
    parts = list(sample.pieces_of_text(tokenizer, tokenizer.encode("a "), iter(ids)))
    assert "".join(parts).strip() == "🎉🎉" and "\ufffd" not in "".join(parts)


@pytest.mark.parametrize("kind", ["marked", "bytes"])
@pytest.mark.parametrize("char", ["a", " ", "🎉"])
def test_a_long_run_of_one_character_finishes(kind, char, files):
    tokenizer = JsonTokenizer(files[kind], {})
    assert tokenizer.decode(tokenizer.encode(char * 100_000)) == char * 100_000


def test_an_end_of_text_that_is_not_marked_special_is_no_text(files):
    """By the file, "</s>" in a text would be the end of it."""
    whole = json.loads(files["marked"])
    for token in whole["added_tokens"]:
        token["special"] = False
    tokenizer = JsonTokenizer(json.dumps(whole).encode(), {})
    for first in (False, True):
        ids = tokenizer.encode_piece("a</s><s>", first)
        assert not {tokenizer.bos, tokenizer.eos} & set(ids) and tokenizer.decode(ids) == "a</s><s>"
    assert tokenizer.special_tokens == {"<s>": 1, "</s>": 2}


def test_added_tokens_that_are_text_are_text(files):
    """Runs of blanks, as GPT-NeoX has them, and ids that no token has."""
    whole = json.loads(files["bytes"])
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    new = len(whole["model"]["vocab"])
    whole["added_tokens"].append(dict(id=new, content="      ", **flags))
    tokenizer = JsonTokenizer(json.dumps(whole).encode(), {})
    assert tokenizer.vocab_size == new + 1 and tokenizer.piece_bytes()[new] == 6
    ids = tokenizer.encode("x      y")
    assert new in ids and tokenizer.decode([*ids, new + 1, 40_000]) == "x      y"


# ---- CrystalCoder's ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def crystal(shared) -> Path:
    path = shared / "tokenizer" / "crystalcoder_tokenizer.json"
    if not path.is_file():
        pytest.skip("no crystalcoder_tokenizer.json in ../shared/data/tokenizer")
    return path


def test_crystalcoders_is_llamas_and_22_more(crystal, shared):
    tokenizer = load_tokenizer(crystal)
    coder = sentencepiece.SentencePieceProcessor(
        model_file=str(shared / "tokenizer/llama_tokenizer.model"))
    lines = [line for name in ("wikitext2_valid.txt", "tinyshakespeare.txt") for line in
             (shared / "text" / name).read_text(encoding="utf-8").split("\n")[:400]]
    lines += (REPO / "prepare.py").read_text(encoding="utf-8").replace("▁", "_").split("\n")
    assert sum(map(len, lines)) > 50_000
    for line in [*lines, "\n".join(lines)]:
        ids = tokenizer.encode(line)
        assert ids == coder.encode(line) and tokenizer.decode(ids) == coder.decode(ids) == line
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (32022, 1, 2)
    assert tokenizer.add_bos is False  # the published tokenizer adds neither end
    assert tokenizer.special_tokens["<|fim_prefix|>"] == 32000
    assert tokenizer.piece_bytes()[32000:].sum() == 0
    llama = load_tokenizer(shared / "tokenizer/llama_tokenizer.model")
    assert np.array_equal(tokenizer.piece_bytes()[:32000], llama.piece_bytes())
    ids = tokenizer.encode("<|fim_prefix|>")
    assert max(ids) < 32000 and tokenizer.decode(ids) == "<|fim_prefix|>"


# ---- the folder's word ---------------------------------------------------------------------------

@pytest.mark.parametrize("kind, config, bos", [
    ("marked", None, False), ("bos", None, True), ("bos", {}, True),
    ("bos", dict(add_bos_token=False), False), ("bos", dict(add_bos_token=None), True),
    ("marked", dict(add_bos_token=True), True), ("bos", dict(bos_token=None), False),
    ("marked", dict(tokenizer_class="LlamaTokenizer"), False),
    ("bytes", dict(add_bos_token=True), False)])
def test_whether_bos_is_put_in_front(kind, config, bos, files, tmp_path):
    assert load_tokenizer(folder_of(tmp_path, files[kind], config)).add_bos is bos
    assert load_tokenizer(tmp_path / "tokenizer.json").add_bos is (kind == "bos")


def test_the_ends_of_a_text_are_what_the_folder_says(files, tmp_path):
    end = dict(eos_token=dict(content="<|end|>", lstrip=False), bos_token="<|endoftext|>")
    tokenizer = load_tokenizer(folder_of(tmp_path, files["bytes"], end))
    assert (name_of(tokenizer, tokenizer.bos), name_of(tokenizer, tokenizer.eos)) == (
        "<|endoftext|>", "<|end|>")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.bos, name_of(tokenizer, tokenizer.eos)) == (None, "<|endoftext|>")


def test_a_model_or_ranks_win(files, tmp_path):
    folder_of(tmp_path, files["bytes"])
    assert load_tokenizer(tmp_path).kind == "tokenizer_json"
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (tmp_path / "tokenizer.tiktoken").write_bytes(ranks)
    assert load_tokenizer(tmp_path).kind == "tiktoken"
    (tmp_path / "tokenizer.model").write_bytes(marked().data)
    assert load_tokenizer(tmp_path).kind == "sentencepiece"


def test_a_checkpoint_of_ours_without_its_model(tmp_path):
    """Its tokenizer.json says the same; who changes tokenizer_config.json is heard."""
    ours = marked()
    for name, content in tokenizer_files(ours).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "tokenizer.model").unlink()
    tokenizer, path = load_tokenizer(tmp_path), tmp_path / "tokenizer_config.json"
    assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (1, 2, False)
    assert tokenizer.encode(STORY) == ours.encode(STORY)
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(add_bos_token=True)))
    assert load_tokenizer(tmp_path).add_bos is True


@pytest.mark.parametrize("kind", ["bos", "bytes"])
def test_a_checkpoint_made_with_it(kind, files, tmp_path):
    """The file as it was; its config says what the rows had: no BOS, "</s>" is text."""
    transformers = pytest.importorskip("transformers")
    config = dict(eos_token="<|end|>") if kind == "bytes" else {}
    tokenizer = load_tokenizer(folder_of(tmp_path / "given", files[kind], config))
    (tmp_path / "made").mkdir()
    made = tokenizer_files(tokenizer)
    assert sorted(made) == ["tokenizer.json", "tokenizer_config.json"]
    for name, content in made.items():
        (tmp_path / "made" / name).write_bytes(content)
    assert (tmp_path / "made/tokenizer.json").read_bytes() == files[kind]
    again = load_tokenizer(tmp_path / "made")
    hugging = transformers.AutoTokenizer.from_pretrained(tmp_path / "made")
    assert again.spec() == tokenizer.spec() and again.add_bos is False
    assert (hugging.eos_token_id, hugging.bos_token_id) == (again.eos, again.bos)
    for text in ("the cat", " a", "a</s> <|end|>b", "🎉"):
        # transformers 5 follows the post-processor only, 4 the config: BOS is left to neither.
        ids = hugging.encode(text, add_special_tokens=False)
        assert ids == again.encode(text) == tokenizer.encode(text)


# ---- end to end ----------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["bos", "bytes"])
def checkpoint(request, files, tmp_path_factory) -> Path:
    """A checkpoint folder that has no tokenizer but tokenizer.json."""
    folder = folder_of(tmp_path_factory.mktemp("hub"), files[request.param])
    tokenizer = load_tokenizer(folder)
    model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=32, n_inner=64, vocab_size=384,
                                    seq_len=64, init_std=0.3))
    init_weights(model, 0)
    model.save_pretrained(folder, eos=tokenizer.eos)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors",
                                                  "tokenizer.json"}
    return folder


def test_text_comes_out(checkpoint, capsys):
    sample.main([str(checkpoint), "--prompt=the cat", "--max_new_tokens=30", "--temperature=0"])
    alone = capsys.readouterr().out
    assert alone.startswith("the cat") and len(alone) > 12
    sample.main([str(checkpoint), f"--tokenizer={checkpoint}/tokenizer.json", "--prompt=the cat",
                 "--max_new_tokens=30", "--temperature=0"])
    assert capsys.readouterr().out == alone


def test_a_text_is_scored(checkpoint, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(STORY[:500])
    evaluate.main([str(checkpoint), f"--tasks=text:{tmp_path}/a.txt", f"--output={tmp_path}/o.json",
                   "--device=cpu"])
    one, = json.loads((tmp_path / "o.json").read_text())["runs"]
    tokenizer = load_tokenizer(checkpoint)
    assert one["metrics"]["tokens"] == len(tokenizer.encode(STORY[:500])) + tokenizer.add_bos
    assert one["add_bos"] is tokenizer.add_bos and one["metrics"]["bits_per_byte"] > 0


@pytest.mark.parametrize("kind", ["bos", "bytes"])
def test_rows_are_prepared_with_it(kind, files, tmp_path, monkeypatch):
    """Whole documents, their ends, and a data set's folder that reads as the file did."""
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "given", files[kind])
    Path("a.txt").write_text(STORY)
    argv = [str(REPO / "configs/demo.py"), "--input=a.txt", "--tokenizer=given/tokenizer.json",
            "--vocab_size=384", "--seq_len=16", "--n_chunks=2", "--rows_per_chunk=none",
            "--workers=1", "--valid_rows=0"]
    assert run(prepare.main, prepare.__doc__,
                       [prepare.PrepareOptions, *SECTIONS.values()], argv) == 0
    data = Path("data/demo")
    assert (data / "tokenizer.json").read_bytes() == files[kind]
    tokenizer = load_tokenizer(data, prepare.read_manifest(data)["tokenizer"]["sha256"])
    assert tokenizer.spec() == load_tokenizer("given").spec() and tokenizer.add_bos is False
    rows = {}
    for k in range(2):
        found = np.fromfile(data / f"train_00{k}.bin", np.uint16).reshape(-1, 17)
        origin = np.load(data / f"provenance/train_00{k}.bin.npy")[:, 2]
        rows |= dict(zip(origin.tolist(), found.tolist(), strict=True))
    ids = [i for _, row in sorted(rows.items()) for i in row]
    whole = [*load_tokenizer("given").encode(STORY), tokenizer.eos]
    assert len(ids) > 0.9 * len(whole) and ids == whole[:len(ids)]


# ---- what is wrong with it -----------------------------------------------------------------------

def test_without_the_package(files, tmp_path, monkeypatch):
    """One line that names it, and only where a tokenizer.json is met."""
    folder_of(tmp_path, files["marked"])
    ours.build_tokenizer.cache_clear()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(Stop) as stop:
        load_tokenizer(tmp_path)
    assert stop.value.code == ENVIRONMENT == 6
    assert "pip install tokenizers" in str(stop.value) and "\n" not in str(stop.value)
    (tmp_path / "tokenizer.model").write_bytes(marked().data)
    assert load_tokenizer(tmp_path).kind == "sentencepiece"


def test_the_exit_code_without_the_package(checkpoint, monkeypatch, capsys):
    ours.build_tokenizer.cache_clear()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    code = run(sample.main, sample.__doc__, [sample.SampleOptions], [str(checkpoint)])
    out, err = capsys.readouterr()
    assert code == 6 and not out and len(err.splitlines()) == 1 and "pip install tokenizers" in err


def test_broken_files_are_refused(files, tmp_path, monkeypatch):
    good = json.loads(files["marked"])
    unigram = dict(type="Unigram", unk_id=0, vocab=[["<unk>", 0.0], ["</s>", 0.0]])
    far = good["model"] | dict(vocab=good["model"]["vocab"] | {"far": 1 << 31})
    cases = {
        "empty": b"", "half": files["marked"][:5000], "no object": b"[]", "empty object": b"{}",
        "no text": b"\xff\xfe\0", "deep": b"[" * 100_000, "nul": b"\0" * 100,
        "a config": b'{"model_type": "llama"}', "null model": changed(files["marked"], model=None),
        "unigram": changed(files["marked"], model=unigram, added_tokens=[]),
        "prefix": changed(files["marked"], model=good["model"] | dict(
            continuing_subword_prefix="a")),  # ends the whole process, if the library reads it
        "suffix": changed(files["bytes"], model=json.loads(files["bytes"])["model"] | dict(
            end_of_word_suffix="</w>")),
        "no decoder": changed(files["marked"], decoder=None),
        "another decoder": changed(files["marked"], decoder=dict(type="Fuse")),
        "no end": re.sub(rb"</s>", b"<oh>", files["marked"]),
        "far id": changed(files["marked"], model=far)}
    for name, content in cases.items():
        path = tmp_path / f"{name}.json".replace(" ", "_")
        path.write_bytes(content)
        with pytest.raises(Stop) as stop:
            pytest.fail(f"{name}: {load_tokenizer(path).spec()}")
        said = str(stop.value)
        assert stop.value.code == DATA and str(path) in said and "\n" not in said, name
        assert len(said) < 400, (name, said)
    monkeypatch.setattr(tokenizer_json, "MAX_BYTES", 1000)
    (tmp_path / "large.json").write_bytes(files["marked"] + b"\n")
    with pytest.raises(Stop, match="the limit is 1000"):
        load_tokenizer(tmp_path / "large.json")


@pytest.mark.parametrize("config", [
    dict(eos_token="<gone>"), dict(eos_token=3), dict(bos_token=["<s>"]), dict(bos_token="<gone>"),
    dict(nano360=[1])])
def test_a_config_that_does_not_fit_is_refused(config, files, tmp_path, capsys):
    with pytest.raises(Stop) as stop:
        load_tokenizer(folder_of(tmp_path, files["marked"], config))
    assert stop.value.code == DATA and "\n" not in str(stop.value)


def test_the_exit_code_of_a_broken_file(checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "ckpt")
    (tmp_path / "ckpt/tokenizer.json").write_text("{")
    code = run(sample.main, sample.__doc__, [sample.SampleOptions],
                       [str(tmp_path / "ckpt")])
    out, err = capsys.readouterr()
    assert code == 3 and not out and len(err.splitlines()) == 1 and "tokenizer.json" in err
