"""CrystalCoder-7B, stage 2 of 3: the other half of SlimPajama and two epochs of StarCoder, 927B.

From pretrain/params/phase2/params.yaml. It goes on from stage 1. After a new warm-up of 86 steps
its peak is where the line of stage 1 would be about step 79,830 (stage 1 ended at 0.0087869), and
it ends on that line too.
"""

from configs.crystalcoder_7b_stage1 import *
from configs.crystalcoder_7b_stage1 import sources as _half

# data: 142 chunks of 1,500 steps and 1,387 steps of the 143rd. The site announces 143 checkpoints.
n_chunks = 143
_weights = {  # the other half of SlimPajama, 344.9B tokens
    "arxiv": 0.016083857723861224,
    "book": 0.015358576352403003,
    "c4": 0.09909981505117808,
    "commoncrawl": 0.1983897689052003,
    "github": 0.018454606218343703,
    "stackexchange": 0.011784941022274698,
    "wikipedia": 0.012710859995188247,
}
sources = [one | dict(subset="odd", weight=_weights[one["name"]]) for one in _half] + [
    # StarCoder, 582.5B tokens: two epochs of 291B, each with its own cuts; three are the limit, for
    # two are asked to the last token. Of the documents 0.9 are rewritten to be filled in the
    # middle. Gated: accept its terms, which ask for the newest version and so for no commit here;
    # set HF_TOKEN.
    dict(name="starcoder", path="hf:datasets/bigcode/starcoderdata", files="*.parquet",
         text_key="content", weight=0.6281175747315507, fim_rate=0.9, epochs=3,
         licence="permissive, one per file; The Stack's terms of use"),
]

# Filling in the middle. As in crystalcoder-data-prep, fim_hdf5_stage2.py: a document is cut before
# any two characters (its README says tokens, the code does characters) and becomes prefix, suffix,
# middle (PSM) or, as often, suffix, prefix, middle (SPM). Otherwise than there: whole documents are
# cut, before they are packed. There it was rows, decoded and encoded again, which ended documents
# where rows end, gave "f( x)" for "f(x)", read <s> as three letters, and left rows to be cut short
# or filled up with <|fim_pad|>, masked but counted in the mean of the loss. Marks such as
# <filename> became ids of their own in what was rewritten, text in the rest; here they stay text.

# Stage 1 stops inside its 54th chunk, so it ends in last/. That its optimizer's state was kept is
# inferred, not said: is_pretrained_checkpoint is false in this file and true in stage 3's, where
# true is for weights alone; and the learning rate goes on along the line of stage 1.
init_from = "out/crystalcoder_7b_stage1/last"
init_optimizer = True
lr = 0.0087825
min_lr = 0.00013679
warmup_steps = 86
decay_steps = 214_387  # 86 + 214,301: the end of the stage
max_steps = 214_387  # 927.3B tokens
