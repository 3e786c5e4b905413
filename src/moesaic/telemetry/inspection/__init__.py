"""What a model's experts are for, told from a routing trace: `moesaic inspect`.

windows, routed: text through a checkpoint, into a trace | choices: a trace's rows, crossed with what is known of tokens
token_classes: punctuation, digits, case, affixes | measures: the formulas | findings: all of them, as plain data
tokens, samples: the tokens that experts love, and text to colour | page: a self-contained HTML page
"""
