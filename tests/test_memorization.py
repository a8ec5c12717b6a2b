"""analyze.py memorization: scores against transformers' own loop, and what a run keeps of them."""

import functools
import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import analyze
import prepare
import train
from model import Transformer, init_weights
from nano360.analysis import figures
from nano360.analysis.provenance import documents_of
from nano360.analysis.runs import read_record
from nano360.analysis.samples import draw
from nano360.config import ModelConfig, run
from nano360.rows import read_manifest
from nano360.tokenizers import load_tokenizer
from ranks import ended, start
from test_train import TINY, hashes, prepared, room, words  # noqa: F401

V = 300
MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_inner=64, vocab_size=V, seq_len=64,
                    init_std=0.5)
LOG = Path("memorization.jsonl")
command = functools.partial(run, analyze.main, "", [])  # a command line -> an exit code


def memorization(*argv: str) -> int:
    return command(["memorization", *argv, "--device=cpu"])


def lines(folder: str, kind: str = "row") -> list[dict]:
    found = [json.loads(line) for line in (Path(folder) / LOG).read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def write_sample(path: str, rows: list[list[int]], k: int = 32) -> None:
    Path(path).write_text("".join(json.dumps(dict(
        source="ab"[i % 2], prompt=ids[:k], continuation=ids[k:])) + "\n"
        for i, ids in enumerate(rows)))


@pytest.fixture
def trained(room) -> Path:  # noqa: F811
    """out/tiny after both epochs, 8 checkpoints; rows of 33 ids."""
    train.main(["tiny.py", "--epochs=2"])
    return Path("out/tiny")


# ---- the score -----------------------------------------------------------------------------------

def test_what_was_learned_by_heart_scores_one(tmp_path, monkeypatch):
    """50 rows of random ids, trained until they are known: all of their 32 ids are said again; of
    50 others as many as chance gives, one in V = 300."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    rows = torch.randint(V, (100, 64))
    model = Transformer(MODEL)
    init_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(400):
        loss = model(rows[:50, :-1], rows[:50, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained("known")
    write_sample("learned_1.jsonl", rows[:50].tolist())
    write_sample("others_2.jsonl", rows[50:].tolist())
    assert memorization("known", "--sample=learned_1.jsonl,others_2.jsonl") == 0
    scores = {chunk: [line["score"] for line in lines("known") if line["chunk"] == chunk]
              for chunk in (1, 2)}
    assert scores[1] == [1.0] * 50
    hits = sum(scores[2]) * 32  # of 1,600, each with a chance of 1/300: 5.3 are expected
    assert len(scores[2]) == 50 and hits <= 16  # which chance exceeds once in 10,000


def by_transformers(folder: Path, rows: list[list[int]], k: int, length: int) -> list[int]:
    """How many ids transformers' own greedy generate says again, one row at a time."""
    from transformers import LlamaForCausalLM
    model, found = LlamaForCausalLM.from_pretrained(folder).eval(), []
    model.generation_config.eos_token_id = None  # goes on through EOS
    for ids in rows:
        prompt = torch.tensor([ids[:k]])
        said = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                              max_new_tokens=length, pad_token_id=0)[0, k:].tolist()
        assert len(said) == length
        found.append(sum(a == b for a, b in zip(said, ids[k:k + length], strict=True)))
    return found


@pytest.mark.parametrize("k, length, batch", [(32, 32, 7), (5, 20, 64), (40, 3, 1)])
def test_equals_transformers_item_by_item(k, length, batch, tmp_path, monkeypatch):
    """A Hugging Face folder that transformers wrote, and prompts of which the model knows a part:
    its own words, some of them changed, EOS among them."""
    from transformers import LlamaConfig, LlamaForCausalLM
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.5,
        eos_token_id=2)).save_pretrained("theirs")
    ours, dice = Transformer.from_pretrained("theirs").eval(), np.random.default_rng(2)
    rows = ours.generate(torch.from_numpy(dice.integers(0, V, (40, k))), length,
                         temperature=0).tolist()
    eos = Counter(i for row in rows for i in row[k:-1]).most_common(1)[0][0]
    config = json.loads(Path("theirs/config.json").read_text())
    Path("theirs/config.json").write_text(json.dumps(config | dict(eos_token_id=eos)))
    for i, row in enumerate(rows):  # from none to all of the continuation is changed
        for at in dice.permutation(length)[:i % (length + 1)]:
            row[k + at] = (row[k + at] + 1) % V
    write_sample("rows.jsonl", rows, k)
    assert memorization("theirs", "--sample=rows.jsonl", f"--k={k}", f"--l={length}",
                        f"--batch_size={batch}") == 0
    expected = by_transformers(Path("theirs"), rows, k, length)
    assert len({*expected}) > 3 and any(eos in row[k:-1] for row in rows)
    assert [line["score"] * length for line in lines("theirs")] == expected


def test_analysis360s_own_sample(shared, tmp_path, monkeypatch):
    """Its 1,000 rows are read as they are; where they lie in the released file follows from our
    draw and the blocks of its sources."""
    monkeypatch.chdir(tmp_path)
    sample = shared / "amber" / "memorization_train_355.jsonl"
    rows = [json.loads(line) for line in sample.read_text().splitlines()]
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, n_inner=32, vocab_size=32000, seq_len=64)
    model = Transformer(config)
    init_weights(model, 1)
    model.save_pretrained("m")
    assert memorization("m", f"--sample={sample}") == 0
    found = lines("m")
    assert [line["source"] for line in found] == [row["source"] for row in rows]
    assert {(line["chunk"], line["k"], line["l"]) for line in found} == {(355, 32, 32)}
    picked = draw(1_706_976, 1000, analyze.MemorizationOptions().seed)
    blocks = dict(arxiv=40_670, book=39_125, c4=267_976, refinedweb=901_537, stackexchange=29_486,
                  starcoderdata=395_749, wikipedia=32_401)  # as the published mix rounds them
    edges = np.cumsum([*blocks.values()])
    for row, number in zip(rows, picked, strict=True):
        if np.abs(edges - number).min() > 150:
            assert row["source"] == [*blocks][np.searchsorted(edges, number, side="right")]


# ---- a run ---------------------------------------------------------------------------------------

def test_every_checkpoint_on_every_chunk(trained, capsys):
    """Each line is what the checkpoint says of the row's own ids; sources are those of the way
    back; how often a row was seen is counted from the batches that training logged."""
    before = hashes(trained)
    assert memorization("out/tiny", "--k=4,16", "--l=8", "--rows=10") == 0
    found, data, manifest = lines("out/tiny"), Path("data/tiny"), read_manifest(Path("data/tiny"))
    assert Counter((line["visit"], line["chunk"], line["k"]) for line in found) == {
        (v, c, k): 10 for v in range(8) for c in range(4) for k in (4, 16)}
    chunks = [np.fromfile(data / f"train_{c:03d}.bin", np.uint16).reshape(-1, 33)
              for c in range(4)]
    config, B = json.loads((trained / "run.json").read_text())["config"], 8
    for visit in (0, 5, 7):
        model = Transformer.from_pretrained(trained / f"ckpt_{visit:03d}").eval()
        for line in (one for one in found if one["visit"] == visit):
            row, k = chunks[line["chunk"]][line["row"]].astype(int), line["k"]
            ids = row[:k].tolist()
            for _ in range(8):  # greedy, without a cache
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            assert line["score"] == np.mean(row[k:k + 8] == ids[k:])
            assert line["source"] == documents_of(
                data, manifest, f"train_{line['chunk']:03d}.bin", [line["row"]])[0]["source"]
            words = [np.random.Philox(key=config["data"]["seed"] << 64 | e << 32 | line["chunk"]
                                      ).random_raw(33) for e in range(2)]
            used = [np.argsort(one, kind="stable")[:33 // B * B] for one in words]
            assert line["seen"] == sum(line["row"] in used[e] for e in range(2)
                                       if 4 * e + line["chunk"] <= visit)
    assert {k: v for k, v in hashes(trained).items() if k != LOG.name} == before
    shown = capsys.readouterr().out
    mine = [line for line in found if (line["visit"], line["k"]) == (7, 16) and line["seen"]]
    assert any(line.split() == ["ckpt_007", "16", str(len(mine)),
                                f"{np.mean([one['score'] for one in mine]):.4f}",
                                f"{np.mean([one['score'] == 1 for one in mine]):.2%}"]
               for text in shown.splitlines() for line in [" ".join(text.split()[:5])])


def test_nothing_is_scored_twice(trained, monkeypatch, capsys):
    """More rows, chunks and prompts add to what stands there; a line that a kill cut short is made
    again, and the file is that of a run that nobody disturbed."""
    some = ("out/tiny", "--k=8", "--l=8", "--rows=6", "--checkpoints=1,6-7", "--chunks=0,2-3")
    assert memorization(*some) == 0
    whole, said = (trained / LOG).read_bytes(), capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "from_pretrained", lambda *_: pytest.fail("weights were read"))
        assert memorization(*some) == 0
    assert (trained / LOG).read_bytes() == whole and capsys.readouterr().out == said
    for size in (0, 50, len(whole) // 2, len(whole) - 1):
        (trained / LOG).write_bytes(whole[:size])
        assert memorization(*some) == 0
        assert (trained / LOG).read_bytes() == whole
    assert memorization(*some[:3], "--rows=8", *some[4:]) == 0
    assert (trained / LOG).read_bytes().startswith(whole) and len(lines("out/tiny")) == 3 * 3 * 8
    n = len(lines("out/tiny"))
    assert memorization(*some[:2], "--l=7", *some[3:]) == 0  # another score
    assert len(lines("out/tiny")) == n + 54
    shutil.copytree(trained / "ckpt_005", "copy")  # other weights under this name: other scores
    shutil.rmtree(trained / "ckpt_006")
    Path("copy").rename(trained / "ckpt_006")
    assert memorization(*some) == 0 and len(lines("out/tiny")) == n + 54 + 18


def test_a_single_checkpoint(trained):
    assert memorization("out/tiny/ckpt_002", "--k=8", "--l=8", "--rows=5", "--chunks=1") == 0
    assert {line["visit"] for line in lines("out/tiny")} == {2}
    assert not (trained / "ckpt_002" / LOG).exists()


def test_rows_by_name(trained, capsys):
    """What trace has found, asked of every checkpoint."""
    assert memorization("out/tiny", "--k=8", "--l=8", "--row=3:17,1:5,3:2") == 0
    assert {(line["chunk"], line["row"]) for line in lines("out/tiny")} == {(3, 17), (1, 5), (3, 2)}
    assert len(lines("out/tiny")) == 24
    assert memorization("out/tiny", "--k=8", "--l=8", "--row=3:2,3:2") == 0
    assert len(lines("out/tiny")) == 24
    before = (trained / LOG).read_bytes()
    assert memorization("out/tiny", "--k=8", "--l=8", "--rows=33", "--chunks=3") == 0
    found = lines("out/tiny")  # the same scores, and not twice
    assert (trained / LOG).read_bytes().startswith(before) and len(found) == 24 + 8 * 31
    capsys.readouterr()
    assert memorization("out/tiny", "--k=8", "--l=8", "--row=3:33") == 2
    assert "--row=3:33 is not there: chunk 3 has 33 rows" in capsys.readouterr().err


def test_a_sample_is_not_the_runs_own(trained, capsys):
    """Rows of a file are no rows of a chunk, whatever its name: nobody knows who has seen them.
    Two files are two; of a long one rows are drawn."""
    dice = np.random.default_rng(3)
    for name in ("a", "b", "long_3"):
        rows = dice.integers(0, 290, (50 if name == "long_3" else 4, 16)).tolist()
        Path(f"{name}.jsonl").write_text("".join(
            json.dumps(dict(token_ids=ids, source=name)) + "\n" for ids in rows))
    assert memorization("out/tiny", "--k=8", "--l=8", "--rows=6", "--checkpoints=2,3",
                        "--sample=a.jsonl,b.jsonl,long_3.jsonl") == 0
    found = lines("out/tiny")
    assert {line["seen"] for line in found} == {None} and len(found) == 2 * (4 + 4 + 6)
    assert [line["row"] for line in found if line["source"] == "long_3"][:6] == (
        np.random.default_rng(42).permutation(50)[:6].tolist())
    shown = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert shown[0].split()[2] == "rows" and shown[1].split()[2:3] == ["14"]


def test_a_release_is_a_run(prepared, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Checkpoints that transformers wrote and chunks made of released lines, with no run.json:
    scores, sources, who has seen what; and any text followed to the checkpoints that saw it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    monkeypatch.chdir(tmp_path)
    tokenizer, released = next((prepared / "data/tiny").glob("tokenizer.*")), []
    coder = load_tokenizer(tokenizer)
    for k in range(3):
        released.append([dict(token_ids=coder.encode(words(60, 100 * k + i))[:33], source=name)
                         for i, name in enumerate(["arxiv"] * 10 + ["book"] * 10 + ["c4"] * 10)])
        Path("in").mkdir(exist_ok=True)
        Path(f"in/train_{k:03d}.jsonl").write_text("".join(
            json.dumps(line) + "\n" for line in released[k]))
        torch.manual_seed(k)
        LlamaForCausalLM(LlamaConfig(
            vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=64, initializer_range=0.5)
        ).save_pretrained(f"out/release/ckpt_{k:03d}")
    Path("release.py").write_text(re.sub(
        "sources = .*", f"tokenizer = {str(tokenizer)!r}\nvalid_rows = 2\n"
        "sources = [dict(name='amber', path='in', rows=True)]", TINY).replace(
            "n_chunks = 4", "n_chunks = 3").replace("rows_per_chunk = 33", "rows_per_chunk = 20"))
    prepare.main(["release.py", "--workers=1"])
    assert memorization("out/release", "--k=8", "--l=8", "--rows=9") == 0
    found = lines("out/release")
    assert len(found) == 3 * 3 * 9
    chunks = [np.fromfile(f"data/release/train_{c:03d}.bin", np.uint16).reshape(-1, 33)
              for c in range(3)]
    for visit in range(3):
        mine = [line for line in found if line["visit"] == visit]
        rows = [chunks[line["chunk"]][line["row"]].tolist() for line in mine]
        scores = by_transformers(Path(f"out/release/ckpt_{visit:03d}"), rows, 8, 8)
        assert [line["score"] * 8 for line in mine] == scores
        for line, ids in zip(mine, rows, strict=True):
            assert dict(token_ids=ids, source=line["source"]) in released[line["chunk"]]
            assert line["seen"] == (line["chunk"] <= visit)
    Path("text").write_text(coder.decode(chunks[1][4].tolist()))
    capsys.readouterr()
    assert command(["trace", "out/release", "--file=text"]) == 0
    assert any(line.split()[:2] == ["001", "4"] and line.endswith("ckpt_001 and 1 later")
               and "not released" in line for line in capsys.readouterr().out.splitlines())
    assert command(["batch", "out/release", "--step=1"]) == 2
    assert "out/release is a release" in capsys.readouterr().err
    assert memorization("out/release/ckpt_001", "--k=8", "--l=8", "--rows=9", "--chunks=2") == 0
    assert lines("out/release") == found and not list(Path("out/release/ckpt_001").glob("mem*"))


def test_ranks_score_as_one(server, trained):
    asked = ["memorization", "out/tiny", "--k=8", "--l=8", "--rows=7", "--checkpoints=3,7",
             "--batch_size=2", "--device=cpu"]
    assert command(asked) == 0
    alone = (trained / LOG).read_bytes()
    (trained / LOG).unlink()
    assert ended(start(server, command, asked, 3)) == [0, 0, 0]
    assert (trained / LOG).read_bytes() == alone
    assert not Path("out.1").read_text() and "ckpt_007" in Path("out.0").read_text()


def test_text_is_printed_only_when_it_is_asked_for(trained, capsys):
    asked = ("out/tiny", "--k=8", "--l=1", "--rows=33", "--checkpoints=7")
    assert memorization(*asked) == 0
    hidden = capsys.readouterr()
    assert any(line["score"] == 1 for line in lines("out/tiny"))
    colours = ("red", "green", "blue")
    assert not any(word in hidden.out + hidden.err for word in colours)
    assert not any(word in (trained / LOG).read_text() for word in colours)
    assert memorization(*asked, "--show_text") == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in colours) and "|" in shown


# ---- canaries ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def planted(prepared, tmp_path_factory) -> Path:  # noqa: F811
    """A folder with a run on data in which one string is planted once, one ten times, one a
    hundred times."""
    root, before = tmp_path_factory.mktemp("planted"), Path.cwd()
    for name in ("tiny.py", "a.jsonl", "b.txt"):
        shutil.copy(prepared / name, root / name)
    config = ["tiny.py", "--seq_len=48", "--canaries=1"]
    os.chdir(root)
    try:
        prepare.main([*config, "--rows_per_chunk=122", "--workers=1"])
        train.main([*config, "--rows_per_chunk=122", "--log_every=50"])
    finally:
        os.chdir(before)
    return root


@pytest.mark.numeric
def test_canaries(planted, tmp_path, monkeypatch, capsys):
    """Loss, rank and extraction of every string, by a forward pass for each of its ids; how often
    it was seen, by counting in the batches of the run."""
    shutil.copytree(planted, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert memorization("out/tiny", "--k=4", "--l=4", "--rows=2", "--batch_size=50") == 0
    found = lines("out/tiny", "canary")
    canaries = json.loads(Path("data/tiny/canaries.json").read_text())["canaries"]
    assert Counter((line["visit"], line["planted"]) for line in found) == {
        (v, n): 200 if n == 0 else 1 for v in range(4) for n in (0, 1, 10, 100)}
    config, _ = read_record(Path("out/tiny"))
    manifest = read_manifest(Path("data/tiny"))
    plan, trained = train.make_plan(config, manifest), Counter()
    per_visit = plan.steps_per_visit
    batches = train.batches(config, plan, manifest, Path("data/tiny"), 1)
    for visit in range(4):
        for _, _, rows in (next(batches) for _ in range(per_visit)):
            trained.update(one["number"] for one in canaries for row in rows
                           if bytes(np.array(one["ids"], np.uint16)) in row.tobytes())
        model = Transformer.from_pretrained(f"out/tiny/ckpt_{visit:03d}").eval()
        mine = {line["canary"]: line for line in found if line["visit"] == visit}
        for one in canaries if visit == 3 else canaries[:5]:
            ids, n, line = one["ids"][:-1], one["n_prefix"], mine[one["number"]]
            log_p = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1).detach()
            nats = -sum(float(log_p[t - 1, ids[t]]) for t in range(n, len(ids)))
            assert line["nats"] == pytest.approx(nats, rel=1e-4)
            said = ids[:n]
            while len(said) < len(ids):
                said.append(int(model(torch.tensor([said]))[0, -1].argmax()))
            assert line["extracted"] == (said == ids)
            assert line["seen"] == trained[one["number"]]
        controls = sorted(line["nats"] for line in mine.values() if not line["planted"])
        for line in mine.values():
            assert line["rank"] == (1 + sum(x < line["nats"] for x in controls)
                                    if line["planted"] else None)
    last = {line["planted"]: line for line in found if line["visit"] == 3}
    assert last[100]["rank"] == 1 and last[1]["rank"] > 1 and last[100]["seen"] > 90
    shown = capsys.readouterr().out
    assert not any(one["secret"] in shown for one in canaries)
    row = next(text.split() for text in shown.splitlines()
               if text.split()[:2] == ["ckpt_003", "100"])
    assert row[2:5] == ["1", f"{last[100]['seen']:.1f}", f"{last[100]['nats']:.2f}"]
    before = (Path("out/tiny") / LOG).read_bytes()
    assert memorization("out/tiny", "--k=4", "--l=4", "--rows=2", "--plot") == 0
    assert (Path("out/tiny") / LOG).read_bytes() == before
    assert Path("out/tiny/memorization.png").stat().st_size > 10_000


def test_canaries_after_a_kill_and_over_ranks(server, planted, tmp_path, monkeypatch, capsys):
    """Each line once, wherever the file was cut; two ranks find what one does, and find it done."""
    shutil.copytree(planted, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    asked = ["memorization", "out/tiny", "--k=4", "--l=4", "--rows=3", "--checkpoints=1,3",
             "--device=cpu"]
    log = Path("out/tiny") / LOG
    assert command(asked) == 0
    whole, printed = log.read_bytes(), capsys.readouterr().out
    at = whole.index(b'"kind": "canary"')
    for size in (at - 5, at + 3000, len(whole) - 9):
        log.write_bytes(whole[:size])
        assert command(asked) == 0 and log.read_bytes() == whole
    log.unlink()
    for _ in range(2):
        assert ended(start(server, command, asked, 2)) == [0, 0], Path("err.1").read_text()
        assert log.read_bytes() == whole and Path("out.0").read_text() == printed


# ---- figures -------------------------------------------------------------------------------------

@pytest.mark.numeric
def test_the_picture_is_drawn_from_the_lines(trained, capsys):
    """Heat map and correlations are those of the lines in the file."""
    import matplotlib.pyplot as plt
    assert memorization("out/tiny", "--k=4,16", "--l=8", "--rows=12", "--plot") == 0
    assert (trained / "memorization.png").read_bytes().startswith(b"\x89PNG")
    assert "out/tiny/memorization.png is drawn" in capsys.readouterr().out
    found = [line for line in lines("out/tiny") if line["k"] == 4]
    _, axes = plt.subplots(1, 2)
    figures.draw_heat_map(axes[0], found)
    figures.draw_correlation(axes[1], found)
    heat, matrix = (np.asarray(ax.images[0].get_array()) for ax in axes)
    plt.close("all")
    scores = {(line["visit"], line["chunk"], line["row"]): line["score"] for line in found}
    for v in range(8):
        for c in range(4):
            assert heat[v, c] == pytest.approx(np.mean(
                [x for (visit, chunk, _), x in scores.items() if (visit, chunk) == (v, c)]))
    columns = [[x for (visit, *_), x in scores.items() if visit == v] for v in range(8)]
    assert matrix == pytest.approx(np.corrcoef(columns))


def test_without_matplotlib(trained, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert memorization("out/tiny", "--k=4", "--l=4", "--plot") == 6
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (trained / LOG).exists()


# ---- what cannot be ------------------------------------------------------------------------------

def test_bad_input(trained, capsys):
    """One line each, with the exit code; nothing is written."""
    model = Transformer(MODEL)
    init_weights(model, 3)
    model.save_pretrained("other", 1, 2)
    write_sample("good.jsonl", [[*range(40)]], 20)
    Path("broken.jsonl").write_text('{"prompt": [1, 2]}\n')
    Path("text.jsonl").write_text('{"token_ids": ["a"], "source": "b"}\n')
    Path("large.jsonl").write_text(json.dumps(dict(token_ids=[V] * 70, source="b")) + "\n")
    Path("bytes.jsonl").write_bytes(b'{"source": "SECRET \xe9"}\n')
    Path("empty.jsonl").write_text("")
    Path("out/empty").mkdir()
    shutil.copy("out/tiny/run.json", "out/empty/run.json")
    before = hashes(Path("out"))
    for argv, code, parts in (
            ((), 2, ["expected a run"]), (("nowhere",), 2, ["nowhere is no run"]),
            (("out/tiny", "--k=0"), 2, ["--k"]), (("out/tiny", "--k=32", "--l=32"), 2, [
                "k + l = 64", "33 ids"]),
            (("out/tiny", "--k=8", "--l=8", "--checkpoints=9"), 2, ["checkpoint", "9", "0, 1"]),
            (("out/tiny", "--k=8", "--l=8", "--chunks=2-4"), 2, ["chunk", "4", "0, 1, 2, 3"]),
            (("out/tiny", "--k=8", "--l=8", "--chunks=x"), 2, ["--chunks"]),
            (("out/tiny", "--k=8", "--l=8", "--chunks=3-1"), 2, ["chunk 1 of 3-1", "0, 1, 2, 3"]),
            (("out/tiny", "--k=8", "--l=8", "--chunks=0-99999999999"), 2, ["chunk 99999999999"]),
            (("out/tiny", "--k=8", "--l=8", "--checkpoints=7-6"), 2, ["checkpoint 6 of 7-6"]),
            (("out/tiny", "--k=8", "--l=8", "--chunks=1", "--row=1:1"), 2, ["one of --chunks"]),
            (("out/empty", "--k=8", "--l=8"), 2, ["out/empty: checkpoint is not there", "none"]),
            (("other",), 3, ["other does not say", "--data=DIR", "--sample=FILE"]),
            (("other", "--sample=nowhere.jsonl"), 3, ["nowhere.jsonl cannot be read"]),
            (("other", "--sample=empty.jsonl"), 3, ["empty.jsonl has no lines"]),
            (("other", "--sample=good.jsonl", "--k=8", "--l=8"), 3, ["line 1", "20 + 20", "k = 8"]),
            (("other", "--sample=broken.jsonl"), 3, ["broken.jsonl, line 1"]),
            (("other", "--sample=bytes.jsonl"), 3, ["bytes.jsonl, line 1 is no line of a sample"]),
            (("other", "--sample=text.jsonl"), 3, ["text.jsonl, line 1"]),
            (("other", "--sample=large.jsonl"), 3, ["id 300", "has 300"]),
            (("other", "--sample=large.jsonl", "--k=60"), 2, ["k + l = 92", "is 64"])):
        assert memorization(*argv) == code, argv
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and all(part in said for part in parts), said
        assert "SECRET" not in said
    assert hashes(Path("out")) == before and not (Path("other") / LOG).exists()
    for text in ("{}", "[]", '{"kind": "row"}', "x"):
        (trained / LOG).write_text(f"{text}\n")
        assert memorization("out/tiny", "--k=8", "--l=8") == 4
        assert "has a line that is no score" in capsys.readouterr().err
