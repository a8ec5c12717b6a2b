"""Amber-7B from its sources: the mix of amber_7b.py made again from text, tokens and all.

The recipe is LLM360/amber-data-prep's. It cannot give the released rows to the bit: there the order
of documents hung on the number of workers, and the held-out rows were drawn without a seed; and one
source of seven is gone, see `book`. With those rows to be had, amber_7b.py is the exact one.
"""

from configs.amber_7b import *  # noqa: F403

# data: 360 chunks x 1,706,976 rows x 2,049 tokens. A weight is the source's billions of tokens in
# the table of the data set's card; of their sum, 1259.11, the shares are 2.38, 2.29, 15.70, 52.82,
# 1.73, 23.18 and 1.90 %. Each is one pass, but for `book`. The recipe's README.md lists RedPajama's
# github too; the released rows have none of it: StarCoder is there instead.
_redpajama = "list:https://data.together.xyz/redpajama-data-1T/v1.0.0/urls.txt"
sources = [
    dict(name="arxiv", path=_redpajama, files="arxiv/*", weight=30.00,
         licence="arXiv terms of use"),
    # RedPajama's book/book.jsonl, PG-19 and Books3, was withdrawn over the copyright of Books3
    # (amber-data-prep, issue 2); the released chunks still hold it, as tokens. Its substitute is
    # what the Library of Congress scanned and declares to be in the public domain: 140,000 English
    # books, 47 GB. At an assumed 3.9 bytes a token these are 12B tokens, so that 28.86B are 2.4
    # passes; up to four cost little (arXiv 2305.16264). Old text, with the errors of its OCR.
    dict(name="book", path="hf:datasets/storytracer/LoC-PD-Books", files="data/*.parquet",
         weight=28.86, epochs=3, licence="cc0-1.0"),
    dict(name="c4", path=_redpajama, files="c4/*", weight=197.67, licence="odc-by"),
    # in the place of RedPajama's common_crawl: 5,534 files of 0.3 GB
    dict(name="refinedweb", path="hf:datasets/tiiuae/falcon-refinedweb", files="data/*.parquet",
         text_key="content", weight=665.01, licence="odc-by"),
    dict(name="stackexchange", path=_redpajama, files="stackexchange/*", weight=21.75,
         licence="cc-by-sa"),
    # All 92 folders, as in starcoder-lang.list: languages, issues, commits, notebooks. Gated:
    # accept its terms, which ask for the newest version and so for no commit here; set HF_TOKEN.
    dict(name="starcoderdata", path="hf:datasets/bigcode/starcoderdata", files="*.parquet",
         text_key="content", weight=291.92,
         licence="permissive, one per file; The Stack's terms of use"),
    dict(name="wikipedia", path=_redpajama, files="wikipedia/*", weight=23.90,
         licence="cc-by-sa-3.0, GFDL"),
]
rows_per_chunk = 1_706_976  # as released; train.py leaves out the 96 that fill no batch
overlap = False  # the released windows do not: of 2,049 tokens the first is never a target

# Amber held out 102,400 rows a source, 0.21B tokens, and published none. A pass has to last for the
# weight above, so not more than that may go: of refinedweb 0.0002 is 0.13B. Of the smallest, books
# and stackexchange, it is about 28 books and 4.4M tokens: more than 1,024 rows of either.
valid_share = 0.0002
valid_rows = 1024
