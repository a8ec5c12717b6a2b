"""The way back: from a row of a chunk to the documents it was cut from.

    documents_of(folder, manifest, "train_003.bin", [17, 18])

Reads data/<dataset>/provenance/, which prepare.py writes and describes. train.py asks for the
documents behind a step that failed.
"""

import json
from pathlib import Path

import numpy as np


def documents_of(folder: Path, manifest: dict, name: str, rows: list[int]
                 ) -> list[dict] | None:
    """{row, source, file, line} of every document that a token of these rows is from, in order.

    `rows` are places in the file `name` of a data set. Of a release, whose documents are not known,
    it is the line of the row itself. None where the set came without its provenance/.
    """
    if not (folder / "provenance" / f"{name}.npy").is_file():
        return None
    way, sources, recipe = folder / "provenance", manifest["sources"], manifest["recipe"]
    origins, released = np.load(way / f"{name}.npy"), recipe["sources"][0]["rows"]
    stride = manifest["seq_len"] + (not recipe["overlap"])  # from a row's first token to the next's
    tables, names, found = {}, {}, []
    for row in rows:
        source, epoch, number = map(int, origins[row])
        label = sources[source]["name"]
        if (of := recipe["sources"][0]["name"] if released else label) not in names:
            names[of] = json.loads((way / f"{of}_files.json").read_text(encoding="utf-8"))
        if released:
            chunk = int(name.removeprefix("train_").removesuffix(".bin"))
            found.append(dict(row=row, source=label, file=names[of][chunk], line=number))
            continue
        if (label, epoch) not in tables:
            tables[label, epoch] = np.load(way / f"{label}_epoch_{epoch}.npy")
        documents = tables[label, epoch]  # (n, 3): first token, file, line
        first = number * stride
        start = np.searchsorted(documents[:, 0], first, side="right") - 1
        end = np.searchsorted(documents[:, 0], first + manifest["seq_len"], side="right")
        found += [dict(row=row, source=label, file=names[of][file], line=int(line))
                  for _, file, line in documents[start:end]]
    return found
