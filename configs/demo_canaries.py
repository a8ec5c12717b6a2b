"""The demo with strings planted in its text, by which analyze.py measures what is remembered.

All else is configs/demo.py: the text, the tokenizer, the model, the order of the rows.
"""

from configs.demo import *

# 8 x (1 + 10 + 100) = 888 of 8 x 1,024 = 8,192 rows hold one, of 25 to 28 tokens: 1.1 % of
# all tokens
canaries = 8
