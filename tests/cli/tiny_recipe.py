"""A recipe that trains in a moment."""

RECIPE = """
vocab_size = 300
[model]
model_type = "mixtral"
hidden_size = 24
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
num_local_experts = 5
num_experts_per_tok = 2
intermediate_size = 12
[train]
steps = 2
batch_size = 2
sequence_length = 16
evaluate_tokens = 64
"""

ENCODER_DECODER = """
vocab_size = 380
[model]
model_type = "switch_transformers"
d_model = 24
d_kv = 6
d_ff = 12
num_heads = 2
num_layers = 2
num_sparse_encoder_layers = 1
num_sparse_decoder_layers = 1
num_experts = 5
[train]
steps = 2
batch_size = 2
sequence_length = 32
evaluate_tokens = 64
"""
