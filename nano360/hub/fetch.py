"""The network: the one place that data, models and benchmarks come in through.

    commit, remotes = list_hub("datasets/OWNER/NAME", "main", "*.parquet")   # Hugging Face's hub
    remotes = list_urls("https://HOST/PATH/urls.txt", "arxiv/*")             # one URL a line
    fetch(remote, inside(folder, remote.name))
    fetch_repo("LLM360/Amber@ckpt_100", "", folder)  # prepare.py --hub=REPO[@REVISION] --to=DIR

A download grows in PATH.part, PATH.part.json says what of; PATH is there whole and checked, or not
at all. The token in HF_TOKEN is sent to the hub alone, and is in no file and no message.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urljoin

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError  # what a body breaks off with, below requests

from nano360.config import CHECKPOINT, DATA, NAME, USAGE, Stop, say
from nano360.files import locked, read_sealed, sha256_file, sync, write_sealed
from nano360.sources import Remote, shown

HUB = "https://huggingface.co"
SCHEMES = ("https://",)  # what a URL, also of a redirect, must begin with
TIMEOUT = (10.0, 60.0)  # seconds, to connect and for each read
HOPS, TRIES, PAUSE = 5, 8, 1.0  # redirects; tries that bring nothing; seconds, then doubled
LIMIT, LISTING, PAGES = 2**38, 64 * 10**6, 1000  # bytes of a file, of a listing's page; pages
BLOCK = 1 << 20  # bytes read at once, at most
WEIGHTS = (("*.safetensors", "*.safetensors.index.json"),
           ("pytorch_model*.bin", "pytorch_model.bin.index.json"))
OURS = ("hub.json", "hub.json.sha256")  # what fetch_repo writes itself
TOKENIZER = ("tokenizer.model", "tokenizer.json")
BESIDE = (*TOKENIZER, "config.json", "generation_config.json", "tokenizer_config.json",
          "special_tokens_map.json", "added_tokens.json")


def check_name(name: str) -> str:
    """The name, if it is a path that stays below any folder, and none that is written here."""
    last = name.lower().rpartition("/")[2]
    if (not name.isprintable() or "\\" in name or re.match("[A-Za-z]:", name)
            or {"", ".", ".."} & {*name.split("/")}
            or last in OURS or last.endswith((".part", ".part.json", ".part.lock", ".bad"))):
        raise Stop(DATA, f"{name!r} is no name for a file; expected a path below its source, and "
                         "not .part, .part.json, .bad or hub.json: leave it out by --files")
    return name


def inside(root: Path, name: str) -> Path:
    """root/name, if it is below root, whatever the folders between are symlinks to."""
    path = root / check_name(name)
    if not path.resolve().is_relative_to(root.resolve()):
        raise Stop(DATA, f"{path} leads out of {root}; expected no symlinks: move it away")
    return path


def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Add the token where the hub is asked, by the URL that will be connected to."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and request.url.startswith(f"{HUB}/"):
        if not re.fullmatch("[!-~]+", token):  # the error of http.client would show it
            raise Stop(USAGE, "HF_TOKEN holds what no token does; expected one such as hf_...")
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def checked(answer: requests.Response, name: str, ok: tuple[int, ...]) -> requests.Response:
    """The answer, if it can be what was asked for. Raises Stop, or what `persist` tries again."""
    code, at, headers = answer.status_code, shown(answer.url), answer.headers
    page = "text/html" in headers.get("Content-Type", "").lower() and code != 416
    if code in (408, 429) or code >= 500:
        raise requests.RequestException(f"it answered {code}", response=answer)
    if code in (404, 410):
        what = f"is not found ({code}): its name or revision is wrong or withdrawn"
    elif code in (401, 403) and at.startswith(f"{HUB}/"):
        path = re.sub("^/(api/)?(models/)?", "", at.removeprefix(HUB)).split("/")
        repo = "/".join(path[:3 if path[0] == "datasets" else 2])
        token = "was sent" if "Authorization" in answer.request.headers else "is not set"
        what = (f"is gated, private or misspelt ({code}): accept its terms on {HUB}/{repo} and set "
                f"HF_TOKEN to a token that may read it; HF_TOKEN {token}")
    elif code not in ok:
        what = f"{'is forbidden: it ' if code in (401, 403) else ''}answered {code}, expected 200"
    elif page and not name.lower().endswith((".html", ".htm")):
        what = f"sent a web page instead of the file {name}: is this network asking for a login?"
    elif headers.get("Content-Encoding", "identity").lower() != "identity":
        what = "sent the file packed, though asked for it as it is: fetch it by hand"
    else:
        return answer
    raise Stop(DATA, f"{at} {what}")


def send(method: str, url: str, headers: dict[str, str | None], name: str,
         ok: tuple[int, ...] = (200,)) -> requests.Response:
    """Ask, follow redirects -> the answer, its body still to be read."""
    at = url
    for _ in range(HOPS + 1):
        if not at.startswith(SCHEMES):
            raise Stop(DATA, f"{shown(url)} leads to {shown(at)}; expected {' or '.join(SCHEMES)}")
        with requests.Session() as session:
            request = session.prepare_request(requests.Request(  # an auth, so that .netrc is none
                method, at, headers | {"Accept-Encoding": "identity"}, auth=sign))
            settings = session.merge_environment_settings(request.url, {}, True, None, None)
            # not session.send, which reads the body of a redirect, however long
            answer = session.get_adapter(request.url).send(request, timeout=TIMEOUT, **settings)
        link = answer.headers.get("Location")
        if answer.status_code not in (301, 302, 303, 307, 308) or not link:
            return checked(answer, name, ok)
        answer.close()
        at = urljoin(at, link)
    raise Stop(DATA, f"{shown(url)} was redirected more than {HOPS} times, last to {shown(at)}")


def blocks(answer: requests.Response) -> Iterator[bytes]:
    """The body as it arrives, so that nothing is lost where it breaks off."""
    return iter(lambda: answer.raw.read1(BLOCK, decode_content=False), b"")


def facts(answer: requests.Response) -> tuple[int | None, str]:
    """The length of the body; the ETag, if equal ones mean equal bytes."""
    size = re.fullmatch(r"\d{1,18}", answer.headers.get("Content-Length", ""))
    etag = re.fullmatch('"[!#-~]+"', answer.headers.get("ETag", ""))
    return int(size[0]) if size else None, etag[0] if etag else ""


def asked_pause(answer: requests.Response | None) -> float:
    """The seconds in Retry-After, at most 300."""
    text = "" if answer is None else answer.headers.get("Retry-After", "")
    return min(300, int(text)) if re.fullmatch("[0-9]{1,9}", text) else 0  # a date: our own


def persist(once: Callable[[], Any], url: str, kept: Callable[[], int] = lambda: 0) -> Any:
    """What once() returns, tried again where the network fails; kept() counts what has arrived."""
    tries, most = 0, kept()
    while True:
        try:
            return once()
        except (requests.RequestException, HTTPError, ValueError) as error:
            ours = type(error) is requests.RequestException  # texts of others hold whole URLs
            trouble = str(error) if ours else f"the network failed ({type(error).__name__})"
            hopeless = isinstance(error, ValueError)
            asked = asked_pause(getattr(error, "response", None))
        if hopeless:
            raise Stop(DATA, f"{shown(url)}, or where it leads, is no address: {trouble}")
        tries, most = (0, kept()) if kept() > most else (tries + 1, most)
        if tries == TRIES:
            raise Stop(DATA, f"{shown(url)}: {trouble}, {TRIES} times in a row; {kept():,} bytes "
                             "are kept: run the same command again: it goes on")
        pause = max(asked, min(60, PAUSE * 2 ** max(0, tries - 1)))
        say(f"{shown(url)}: {trouble}; again in {pause:.0f} s")
        time.sleep(pause)


def differs(path: Path, remote: Remote) -> str:
    """How a file's content is not the one that is known, "" if it is."""
    size, found = path.stat().st_size, ""
    if remote.size not in (None, size):
        return f"has {size} bytes, expected {remote.size}"
    if remote.sha256:
        found = sha256_file(path)
    elif remote.blob:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.sha1(b"blob %d\0" % size)).hexdigest()
    known = remote.sha256 or remote.blob
    return "" if found == known else f"has the hash {found}, expected {known}"


def begun(remote: Remote, have: int, note: Path) -> tuple[int, dict]:
    """How much of path.part can be gone on from, and its note: what the part is of."""
    new = {"url": shown(remote.url), "hash": remote.sha256 or remote.blob, "etag": ""}
    try:
        old = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0, new
    same = isinstance(old, dict) and old == new | {"etag": old.get("etag")}
    sure = same and (old["etag"] or old["hash"]) and have <= (remote.size or have)
    return (have, old) if sure else (0, new)


def write(file: io.FileIO, block: bytes, size: int | None) -> None:
    rest = memoryview(block)
    try:
        while rest:
            rest = rest[file.write(rest):]
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        left = "more" if size is None else f"{size - os.fstat(file.fileno()).st_size:,}"
        free = shutil.disk_usage(Path(file.name).parent).free
        raise Stop(CHECKPOINT, f"{file.name}: {error.strerror}: needed {left} bytes, free {free:,};"
                   " what has arrived is kept: make room, the same command goes on") from None


def attempt(remote: Remote, file: io.FileIO, note: Path, limit: int) -> None:
    """One try at what path.part has not yet."""
    have, about = begun(remote, os.fstat(file.fileno()).st_size, note)
    if have and have == remote.size:
        return
    rest = {"Range": f"bytes={have}-", "If-Range": about["etag"] or None} if have else {}
    with send("GET", remote.url, rest, remote.name, (200, 206, 416)) as answer:
        total, etag = facts(answer)
        found = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})",
                             answer.headers.get("Content-Range", ""))
        if (answer.status_code == 206 and found and int(found[1]) == have
                and about["etag"] in ("", etag)):  # a cache may pass over If-Range
            total = int(found[2])
        else:
            note.unlink(missing_ok=True)  # so that whatever comes now, or next, is from the start
            if answer.status_code != 200:
                raise requests.RequestException("it sent another part than the one asked for")
            have, about = 0, about | {"etag": etag}
        size = total if remote.size is None else remote.size
        if total not in (None, size) or (size or 0) > limit or (
                remote.etag and etag not in ("", remote.etag)):
            file.truncate(0)
            raise Stop(DATA, f"{shown(remote.url)} has {total} bytes, ETag {etag}; expected {size} "
                             f"{remote.etag}, at most {limit}: was it changed? none of it is kept")
        if not have:  # emptied before the note is written, so that the two never disagree
            file.truncate(0)
            note.write_text(json.dumps(about), encoding="utf-8")
        most = limit if size is None else size
        with tqdm(desc=remote.name, total=size, initial=have, unit="B", unit_scale=True,
                  disable=None) as bar:
            for block in blocks(answer):
                if have + len(block) > most:
                    file.truncate(0)
                    raise Stop(DATA, f"{shown(remote.url)} is longer than the {most:,} bytes it "
                                     "should or may have; nothing of it is kept")
                write(file, block, size)
                have += len(block)
                bar.update(len(block))
    if size is not None and have != size:
        raise requests.RequestException(f"it broke off at {have:,} of {size:,} bytes")


def fetch(remote: Remote, path: Path, limit: int = LIMIT) -> None:
    """Put a remote file at path; return at once where it is already. Raises Stop."""
    part, note = Path(f"{path}.part"), Path(f"{path}.part.json")
    if path.exists():
        if wrong := differs(path, remote):
            raise Stop(DATA, f"{path} {wrong}; move it away, and the same command fetches it")
        note.unlink(missing_ok=True)
        return
    # two that append to one part could make a file of the right size
    with locked(part), open(part, "ab", buffering=0) as file:
        try:
            persist(lambda: attempt(remote, file, note, limit), remote.url,
                    lambda: os.fstat(file.fileno()).st_size)
        except Stop:
            if not os.fstat(file.fileno()).st_size:
                for name in (part, note):
                    name.unlink(missing_ok=True)
            raise
        if wrong := differs(part, remote):
            part.replace(f"{path}.bad")
            note.unlink(missing_ok=True)
            raise Stop(DATA, f"{shown(remote.url)} {wrong}; it is kept as {path}.bad, and the same "
                             "command fetches it again")
        sync(part)
        part.replace(path)
        sync(path.parent)
    note.unlink(missing_ok=True)


def text(url: str) -> tuple[str, str]:
    """A page of a listing, and the link to the next one, "" for none."""
    def once() -> tuple[str, str]:
        page = bytearray()
        with send("GET", url, {}, "listing") as answer:
            for block in blocks(answer):
                page += block
                if len(page) > LISTING:
                    raise Stop(DATA, f"{shown(url)}: a listing of more than {LISTING:,} bytes")
            return page.decode("utf-8-sig", "replace"), answer.links.get("next", {}).get("url", "")
    return persist(once, url)


def matching(names: list[str], pattern: str, where: str) -> list[str]:
    found = sorted(name for name in names if fnmatchcase(name, pattern or "*"))
    if not found:
        raise Stop(DATA, f"{where}: none of {len(names)} files is like {pattern or '*'}; the first "
                         f"are {', '.join(map(repr, sorted(names)[:5])) or 'none'}")
    return found


def hub_file(base: str, entry: dict) -> Remote:
    """A file as a listing has it. Raises ValueError, TypeError, KeyError where that cannot be."""
    large = entry.get("lfs") or {}
    size, digest = (large or entry)["size"], (large or entry)["oid"]
    if type(size) is not int or size < 0 or not re.fullmatch(
            "[0-9a-f]{64}" if large else "[0-9a-f]{40}", digest):
        raise ValueError
    name, known = check_name(entry["path"]), {"sha256" if large else "blob": digest}
    return Remote(name, f"{base}/{quote(name)}", size, **known)


def list_hub(repo: str, revision: str, pattern: str) -> tuple[str, list[Remote]]:
    """owner/name or datasets/owner/name -> the commit that a revision is now, its files by name."""
    if not (re.fullmatch(rf"(datasets/{NAME}|(?!datasets/){NAME})/{NAME}", repo)
            and re.fullmatch("[A-Za-z0-9._/-]*", revision) and ".." not in revision):
        raise Stop(USAGE, f"{repo!r} at {revision!r} is nothing of the hub; expected "
                          "[datasets/]owner/name and a branch, a tag or a commit")
    api = f"{HUB}/api/{'' if repo.startswith('datasets/') else 'models/'}{repo}"
    link, found = f"{api}/revision/{quote(revision or 'main', safe='')}", {}
    try:
        commit = json.loads(text(link)[0])["sha"]
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise ValueError
        link = f"{api}/tree/{commit}?recursive=true"
        for _ in range(PAGES):
            page, after = text(link)
            found |= {one["path"]: one for one in json.loads(page) if one["type"] == "file"}
            link = after and urljoin(link, after)
            if not link.startswith(f"{HUB}/"):
                break
        if link:  # one page too many, or one that is elsewhere
            raise ValueError
        names = matching([*found], pattern, f"{HUB}/{repo}")
        return commit, [hub_file(f"{HUB}/{repo}/resolve/{commit}", found[name]) for name in names]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Stop(DATA, f"{shown(link or api)} is no listing of files as the hub writes them; is "
                         "this network letting it through?") from None


def ask(url: str) -> Remote:
    """Size and ETag of one URL. Its name is the last part of its path."""
    name = check_name(unquote(re.split("[?#]", url)[0].rpartition("/")[2]))
    def once() -> Remote:
        with send("HEAD", url, {}, name) as answer:
            return Remote(name, url, facts(answer)[0], etag=facts(answer)[1])
    return persist(once, url)


def list_urls(url: str, pattern: str) -> list[Remote]:
    """The URLs in a text file, one a line, named by their paths below the file's own folder."""
    root, found = re.split("[?#]", url)[0].rpartition("/")[0] + "/", {}
    for one in filter(None, map(str.strip, text(url)[0].splitlines())):
        if not one.startswith(SCHEMES):
            raise Stop(DATA, f"{shown(url)} lists {shown(one)}; expected only {SCHEMES[0]}")
        bare = re.split("[?#]", one)[0]
        name = check_name(unquote(bare.removeprefix(root) if bare.startswith(root) else
                                  "".join(bare.split("/", 3)[3:])))
        if found.setdefault(name, one) != one:
            raise Stop(DATA, f"{shown(url)} lists two files {name}; expected one of each name")
    names = matching([*found], pattern, shown(url))
    with ThreadPoolExecutor(16) as pool:
        asked = tqdm(pool.map(ask, map(found.get, names)), "sizes", len(names), disable=None)
        return [replace(one, name=name) for name, one in zip(names, asked, strict=True)]


def choose(repo: str, files: list[Remote], pattern: str) -> list[Remote]:
    """What --files says, though never the code of a model; or else what model.py reads of one."""
    if repo.startswith("datasets/"):
        return files
    if pattern:
        return [file for file in files if not file.name.lower().endswith(".py")]
    top = {file.name: file for file in files if "/" not in file.name}
    for kind in WEIGHTS:
        names = [name for name in top if any(fnmatchcase(name, glob) for glob in kind)]
        if "config.json" in top and any(fnmatchcase(name, kind[0]) for name in names):
            return [file for name, file in top.items() if name in (*names, *BESIDE)]
    raise Stop(DATA, f"{HUB}/{repo} is no model that is read here: expected config.json and "
                     "*.safetensors or pytorch_model*.bin at its top level")


def pinned(repo: str, revision: str, pattern: str, folder: Path) -> tuple[str, list[Remote]]:
    """The commit a folder is of, as its hub.json says or will say, and the files wanted of it."""
    path, asked = folder / "hub.json", {"repo": repo, "revision": revision}
    old = read_sealed(path, DATA) if Path(f"{path}.sha256").exists() else {}
    if old and {name: old.get(name) for name in asked} != asked:
        raise Stop(USAGE, f"{folder} is of {old.get('repo')}@{old.get('revision')}, not of "
                          f"{repo}@{revision}: choose another --to")
    torn = {path.name, f"{path.name}.part", "hub.json.sha256.part"}  # killed before it was sealed
    if not old and folder.exists() and {file.name for file in folder.iterdir()} - torn:
        raise Stop(USAGE, f"{folder} holds other files, and no hub.json: choose another --to")
    commit, found = list_hub(repo, old.get("commit", revision), pattern)
    files = choose(repo, found, pattern)
    if not old:
        folder.mkdir(parents=True, exist_ok=True)
        write_sealed(path, asked | {"commit": commit, "files": {
            one.name: {"size": one.size, "sha256": one.sha256, "blob": one.blob} for one in files}})
    return commit, files


def fetch_repo(spec: str, pattern: str, folder: Path) -> None:
    """A model or a data set of the hub, at one commit, into a folder of its own."""
    repo, _, revision = spec.partition("@")
    if repo.startswith("datasets/") and not pattern:
        raise Stop(USAGE, f"{repo}: say which files of the data set: --files=PATTERN, '*' for all")
    commit, files = pinned(repo, revision or "main", pattern, folder)
    paths = {inside(folder, file.name): file for file in files}
    have = sum(min(file.size, there.stat().st_size) for path, file in paths.items()
               for there in (path, Path(f"{path}.part")) if there.exists())
    size, free = sum(file.size for file in files), shutil.disk_usage(folder).free
    say(f"{repo} at {commit[:12]}: {len(files)} files, {tqdm.format_sizeof(size)}B, "
        f"{tqdm.format_sizeof(have)}B are there; {tqdm.format_sizeof(free)}B free at {folder}")
    if size - have > free:
        raise Stop(CHECKPOINT, f"{folder}: needed {size - have:,} bytes, free {free:,}: make room "
                               "or choose another --to")
    for path, file in paths.items():
        fetch(file, path)
    say(f"{folder}: {len(files)} files of {repo} at {commit[:12]}, all as the hub has them")
    if "config.json" in {file.name for file in files} and not any(
            (folder / name).exists() for name in TOKENIZER):
        say(f"it came without a tokenizer: give --tokenizer=FILE to whatever reads {folder}")
