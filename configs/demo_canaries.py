"""The demo with strings planted in its text, by which analyze.py measures what is remembered.

All else is configs/demo.py: the text, the tokenizer, the model, the order of the rows.
"""

from configs.demo import *

# 4 x (1 + 10 + 100) = 444 of 8 x 512 = 4,096 rows hold one, of some 27 tokens: 1.1 % of all tokens
canaries = 4
